# SPDX-License-Identifier: Apache-2.0
"""Mean score by depth and context length, for tasks whose needle has a place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

from ems_vllm.eval.report.facts import Point, Report, Series, TaskFacts

STEPS = 20
MAX_DEPTHS = 11


@dataclass(frozen=True)
class HeatCell:
    """Attributes:
    text: Percent; empty where there is no sample.
    step: 0 (all wrong) to STEPS (all right).
    """

    text: str
    step: int


@dataclass(frozen=True)
class HeatMap:
    """One method: a row for every depth, a column for every length."""

    series: Series
    rows: list[list[HeatCell | None]]


@dataclass(frozen=True)
class HeatTab:
    """All methods at one budget."""

    column: float
    maps: list[HeatMap]


@dataclass(frozen=True)
class HeatTask:
    task: TaskFacts
    depths: list[float]
    lengths: list[int]
    tabs: list[HeatTab]


def heat_tasks(report: Report, shown: Sequence[Series]) -> list[HeatTask]:
    """What to draw, for the series shown in figures."""
    return [_heat_task(report, task, shown) for task in report.tasks if _has_map(task)]


def palette() -> list[tuple[str, str]]:
    """Background and text of every step. Red to blue over yellow: colour-blind readers see it."""
    colormap = matplotlib.colormaps["RdYlBu"]
    found = []
    for step in range(STEPS + 1):
        red, green, blue, _ = colormap(step / STEPS)
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        background = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
        found.append((background, "#16181c" if light else "#ffffff"))
    return found


def _has_map(task: TaskFacts) -> bool:
    return task.has_depth and task.higher_is_better


def _heat_task(report: Report, task: TaskFacts, shown: Sequence[Series]) -> HeatTask:
    places = {
        (sample.depth, sample.length)
        for series in shown
        for point in series.points.values()
        for (name, _), sample in point.samples.items()
        if name == task.name and sample.depth is not None
    }
    depths = sorted({depth for depth, _ in places if depth is not None})
    if len(depths) > MAX_DEPTHS:
        depths = [i / (MAX_DEPTHS - 1) for i in range(MAX_DEPTHS)]
    lengths = sorted({length for _, length in places})
    tabs = []
    for column in report.columns:
        maps = [
            HeatMap(series, _rows(point, task, depths, lengths))
            for series in shown
            if (point := series.points.get(None if series.is_full else column)) is not None
            and task.name in point.scores
        ]
        tabs.append(HeatTab(column, maps))
    # Without budgets there is still the full cache to look at.
    if not tabs:
        maps = [HeatMap(s, _rows(s.points[None], task, depths, lengths)) for s in report.fulls]
        tabs = [HeatTab(1.0, maps)]
    return HeatTask(task, depths, lengths, tabs)


def _rows(
    point: Point, task: TaskFacts, depths: Sequence[float], lengths: Sequence[int]
) -> list[list[HeatCell | None]]:
    scores: dict[tuple[float, int], list[float]] = defaultdict(list)
    for (name, prompt), sample in point.samples.items():
        score = point.scores[task.name].get(prompt) if name == task.name else None
        if score is None or sample.depth is None:
            continue
        _, depth = min((abs(depth - sample.depth), depth) for depth in depths)
        scores[depth, sample.length].append(score)
    return [[_cell(scores.get((depth, length))) for length in lengths] for depth in depths]


def _cell(scores: Sequence[float] | None) -> HeatCell | None:
    if not scores:
        return None
    mean = min(max(sum(scores) / len(scores), 0.0), 1.0)
    return HeatCell(f"{100 * mean:.0f}", round(STEPS * mean))
