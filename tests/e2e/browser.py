# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# As desktops and phones show a page: width, height, scheme, physical pixels of one.
SIZES = {"desktop": (1280, 900, "light", 1), "phone": (390, 844, "dark", 3)}
# Without the last four it talks to hosts of its maker.
_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; skips the test where it, or Chromium, is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=_FLAGS.split())
        yield browser
        browser.close()


class Complaints:
    """What a page's console says, and its errors, while it is open."""

    def __init__(self, page: Any) -> None:
        self.found: list[str] = []
        page.on("console", lambda message: self.found.append(message.text))
        page.on("pageerror", lambda error: self.found.append(str(error)))


def open_page(browser: Any, url: str, size: str) -> tuple[Any, Complaints]:
    """A page at one of SIZES, and what it complains of."""
    width, height, scheme, pixels = SIZES[size]
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        device_scale_factor=pixels,
        has_touch=size == "phone",
    )
    complaints = Complaints(page)
    page.goto(url)
    return page, complaints
