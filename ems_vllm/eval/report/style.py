# SPDX-License-Identifier: Apache-2.0
"""One colour and marker per method and one line style per engine, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.eval.report.facts import Series

# Colour-blind readers can tell these apart (Okabe and Ito, then Tol); the second is for a dark
# page. Grey is the full cache's, vermilion is EMS's, and the nearest to vermilion comes last.
PALETTE = (
    ("#7c828a", "#a2a8b0"),
    ("#d55e00", "#ff8a3d"),
    ("#0072b2", "#4fadea"),
    ("#009e73", "#2fc79a"),
    ("#cc79a7", "#e6a1c6"),
    ("#332288", "#978be6"),
    ("#999933", "#c6c65c"),
    ("#56b4e9", "#8fd0f7"),
    ("#882255", "#d0659a"),
    ("#e69f00", "#f2bd4b"),
)
MARKERS = "oos^DvPX<>*"
LINES = ("solid", "dashed", "dotted", "dashdot")
# What the legend draws, in SVG's terms.
DASHES = {"solid": "none", "dashed": "5 3", "dotted": "1.5 2.5", "dashdot": "6 2 1.5 2"}
# Around the origin, four units to each side.
SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.5-3.5h7v7h-7z",
    "^": "M0-4 4 3.5H-4z",
    "D": "M0-4.5 4.5 0 0 4.5-4.5 0z",
    "v": "M0 4 4-3.5H-4z",
    "P": "M-1.4-4h2.8v2.6H4v2.8H1.4V4h-2.8V1.4H-4v-2.8h2.6z",
    "X": "M-2-4 0-2 2-4 4-2 2 0 4 2 2 4 0 2-2 4-4 2-2 0-4-2z",
    "<": "M-4 0 3.5-4v8z",
    ">": "M4 0-3.5-4v8z",
    "*": "M0-4.5 1.2-1.4H4.4L1.9.6 2.8 3.8 0 1.9-2.8 3.8-1.9.6-4.4-1.4H-1.2z",
}


@dataclass(frozen=True)
class Style:
    """How a series is drawn.

    Attributes:
        color: Index into PALETTE.
    """

    color: int
    marker: str
    line: str
    emphasised: bool

    @property
    def dashes(self) -> str:
        return DASHES[self.line]

    @property
    def shape(self) -> str:
        return SHAPES[self.marker]


def styles(series: Sequence[Series]) -> list[Style]:
    """The style of each series, in order."""
    others = list(dict.fromkeys(s.family for s in series if not s.is_full and not s.in_focus))
    variants: dict[str, list[str]] = {}
    found = []
    for each in series:
        siblings = variants.setdefault(each.family, [])
        siblings.append(each.label)
        line = LINES[(len(siblings) - 1) % len(LINES)]
        if each.is_full:
            number = 0
        elif each.in_focus:
            number = 1
        else:
            number = 2 + others.index(each.family)
        color = number if number < 2 else 2 + (number - 2) % (len(PALETTE) - 2)
        found.append(Style(color, MARKERS[number % len(MARKERS)], line, each.in_focus))
    return found
