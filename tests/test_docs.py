# SPDX-License-Identifier: Apache-2.0
"""Pages that are tables of the code are up to date, and links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", GENERATOR["PAGES"])
def test_generated_page_is_current(name):
    expected = GENERATOR["_NOTE"] + GENERATOR["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, (
        "run `python docs/generate.py`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
