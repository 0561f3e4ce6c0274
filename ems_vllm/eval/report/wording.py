# SPDX-License-Identifier: Apache-2.0
"""How numbers and foreign text are written, alike in HTML and Markdown."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from ems_vllm.eval.report.stats import Interval


def percent(fraction: float) -> str:
    """`0.125` is `12.5 %`, with a no-break space."""
    return f"{100 * fraction:.3g}\N{NO-BREAK SPACE}%"


def value(interval: Interval, *, relative: bool, signed: bool = False) -> str:
    """The estimate alone: percent of the full cache, or a score."""
    if math.isnan(interval.value):
        return "-"
    number = 100 * interval.value if relative else interval.value
    text = f"{number:{'+' if signed else ''}.{1 if relative else 3}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def bounds(interval: Interval, *, relative: bool, signed: bool = False) -> str:
    """The interval alone, in the digits of its estimate; empty where it is not known."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return ""
    low, high = (
        value(Interval(bound, bound, bound, 0), relative=relative, signed=signed)
        for bound in (interval.low, interval.high)
    )
    return f"{low} to {high}"


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def size(num_bytes: float) -> str:
    """Bytes in the unit that gives few digits."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"


def duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def printable(text: str, limit: int | None = None) -> str:
    """Foreign text without what a page cannot hold or that would disarrange it.

    Control characters, lone surrogates and marks of direction are written as escapes.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}\N{HORIZONTAL ELLIPSIS} ({len(text):,} characters)"
    return "".join(
        char if char == "\n" or unicodedata.category(char)[0] != "C" else f"\\u{ord(char):04x}"
        for char in text
    )
