# SPDX-License-Identifier: Apache-2.0
"""What the guard measures, beside what is lost."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tables.markdown import percent, table

_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/guard-cpu.json"
_RECIPES, _RATIOS, _KINDS = ("ems", "snapkv"), (0.06, 0.125, 0.25), ("text", "later")


def _rows(**chosen: Any) -> list[dict[str, Any]]:
    rows = json.loads(_RESULTS.read_text(encoding="utf-8"))["requests"]
    return [row for row in rows if all(row[key] == value for key, value in chosen.items())]


def guard() -> str:
    """Errors and losses by recipe and ratio."""
    found = []
    for ratio in _RATIOS:
        for recipe in _RECIPES:
            rows = _rows(recipe=recipe, ratio=ratio)
            mean, worst = ([row[key] for row in rows] for key in ("mean_error", "worst_error"))
            losses = [
                f"{statistics.mean(row['loss'] for row in rows if row['kind'] == kind):+.2f}"
                for kind in _KINDS
            ]
            errors = [f"{statistics.median(mean):.3f}", f"{min(mean):.3f} to {max(mean):.3f}"]
            found.append(
                (percent(ratio), recipe, *errors, f"{statistics.median(worst):.3f}", *losses)
            )
    head = ("kept", "", "error, median", "least to most", "worst layer, median")
    return table((*head, "loss: text", "loss: later"), found)


def ranks() -> str:
    """Rank correlations of error and loss among requests of a recipe."""
    found = []
    for recipe in _RECIPES:
        for kind in _KINDS:
            within = [_correlation(_rows(recipe=recipe, kind=kind, ratio=r)) for r in _RATIOS]
            over_all = _correlation(_rows(recipe=recipe, kind=kind))
            shown = [f"{value:+.2f}" for value in (*within, over_all)]
            found.append((recipe, kind, *shown))
    return table(("", "loss", *map(percent, _RATIOS), "all three together"), found)


def _correlation(rows: list[dict[str, Any]]) -> float:
    """Spearman's."""
    errors, losses = (_ranks([row[key] for row in rows]) for key in ("mean_error", "loss"))
    return statistics.correlation(errors, losses)


def _ranks(values: list[float]) -> list[float]:
    """Equal ones share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def costs() -> str:
    """Seconds of a compaction without and with measuring."""
    rows = json.loads(_RESULTS.read_text(encoding="utf-8"))["costs"]
    return table(
        ("", "a compaction", "measured"),
        (
            (row["recipe"], f"{row['seconds']:.3f} s", f"{row['seconds_measured']:.3f} s")
            for row in rows
        ),
    )
