# SPDX-License-Identifier: Apache-2.0
"""Spans of positions: half-open, [start, stop)."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same positions in as few spans as can be, in order; empty ones are dropped."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def num_covered(spans: Iterable[Span], end: int) -> int:
    """Positions before `end` that any of some spans covers."""
    return sum(min(stop, end) - start for start, stop in merged(spans) if start < end)
