# SPDX-License-Identifier: Apache-2.0
"""Reads the `/metrics` of a server several times."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.doctor.live.page import Page

_TIMEOUT_S = 30
# Seconds from one reading to the next; two readings at least (ours).
_INTERVAL_S = 2.0
_NEEDS_KEY = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@dataclass(frozen=True)
class Reading:
    """A page, and when it was read.

    Attributes:
        at: Seconds of a monotonic clock.
        page: What was read.
    """

    at: float
    page: Page


def read_for(
    url: str, seconds: float, key: str | None, pause: Callable[[float], None] = time.sleep
) -> list[Reading]:
    """Readings from now until `seconds` have passed.

    Args:
        url: Of the server, with or without "/v1" or "/metrics".
        seconds: From the first reading to the last, > 0.
        key: API key, for a server or a proxy that wants one.
        pause: Waits so many seconds.

    Raises:
        ConfigError: no vLLM answers there.
    """
    if not seconds > 0:
        raise ConfigError(f"seconds={seconds:g} is not allowed: give a number above 0.")
    page_url = metrics_url(url)
    readings = [_read(page_url, key)]
    left = seconds
    while left > 0:
        step = min(_INTERVAL_S, left)
        pause(step)
        left -= step
        readings.append(_read(page_url, key))
    return readings


def metrics_url(url: str) -> str:
    """Where the metrics of a server are.

    Raises:
        ConfigError: it is no address of a web server.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url={shown(url)} is not allowed: begin with http:// or https://.")
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"


def _read(url: str, key: str | None) -> Reading:
    page = _parse(url, _fetch(url, key))
    if not page.has("vllm:"):
        raise ConfigError(
            f"url={shown(url)} has no metrics of vLLM: name a vLLM server, started without "
            "--disable-log-stats."
        )
    return Reading(time.monotonic(), page)


def _fetch(url: str, key: str | None) -> str:
    request = urllib.request.Request(url)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        if error.code in _NEEDS_KEY:
            raise ConfigError(
                f"url={shown(url)} answers HTTP {error.code}: give its key in VLLM_API_KEY, or ask "
                "the server itself rather than a proxy."
            ) from None
        raise ConfigError(
            f"url={shown(url)} answers HTTP {error.code}: name a vLLM server, without a path."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"url={shown(url)} does not answer ({reason}): start the server, or correct --url."
        ) from None


def _parse(url: str, text: str) -> Page:
    try:
        return Page.parse(text)
    except (ValueError, KeyError, IndexError):
        raise ConfigError(
            f"url={shown(url)} is not a page of Prometheus metrics: name a vLLM server, without a "
            "path."
        ) from None
