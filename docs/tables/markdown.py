# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and how figures stand in them.

A group is a protocol, or "continuation": running text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

FOCUS = "ems"
TITLES = {"continuation": "text"}
ASKED = ("last", "first", "later")
GROUPS = (*ASKED, "continuation")


@cache
def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results/."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([_row(head), f"|{'---|' * len(head)}", *map(_row, rows)])


def _row(cells: Iterable[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def titles(groups: Iterable[str]) -> list[str]:
    """Of the columns of groups."""
    return [TITLES.get(group, group) for group in groups]


def percent(budget: str | float) -> str:
    """Of a budget that is a fraction."""
    return f"{100 * float(budget):g} %"


def signed(loss: float, group: str) -> str:
    """A loss above another; empty where there is none."""
    return "" if math.isnan(loss) else f"{loss:+.{_digits(group)}f}"


def _digits(group: str) -> int:
    """Text is many tokens, and differs less."""
    return 3 if group == "continuation" else 2
