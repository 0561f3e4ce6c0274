# SPDX-License-Identifier: Apache-2.0
"""Tables of method by budget: estimates, intervals, and which is the best within noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ems_vllm.eval.report.facts import Point, Report, Series, TaskFacts, paired
from ems_vllm.eval.report.stats import (
    Array,
    Interval,
    bootstrap,
    difference,
    macro_mean,
    mean_interval,
    ratio,
    ratio_difference,
)

NOTHING: Array = np.empty((0, 2))


@dataclass
class Cell:
    """One method at one budget.

    Attributes:
        num_tasks: Tasks behind the mean.
        complete: Whether it covers every task compared; only then it can be the best.
        is_best: The best estimate of its column, among at least two.
        is_tied: Not told from the best: the interval of the difference holds zero.
        behind: How far the best is ahead, paired; None for the best itself.
    """

    interval: Interval
    num_tasks: int = 1
    complete: bool = True
    is_best: bool = False
    is_tied: bool = False
    behind: Interval | None = None


@dataclass
class Row:
    series: Series
    cells: dict[float | None, Cell] = field(default_factory=dict)


@dataclass
class Table:
    """Rows in the report's order of series.

    Attributes:
        task: None for the mean over the tasks compared.
        relative: Whether values are fractions of the full cache's score.
        is_difference: Whether values are differences to the full cache.
    """

    task: TaskFacts | None
    relative: bool
    is_difference: bool
    rows: list[Row]

    def cell(self, series: Series, column: float | None) -> Cell | None:
        return next((row.cells.get(column) for row in self.rows if row.series is series), None)

    def column(self, column: float) -> list[tuple[Series, Cell]]:
        return [(row.series, row.cells[column]) for row in self.rows if column in row.cells]


def mean_table(report: Report) -> Table:
    """Means over the tasks compared, each counting the same, relative to the full cache."""
    relative = bool(report.fulls)
    table = Table(None, relative, False, [Row(series) for series in report.series])
    for row in table.rows:
        baseline = report.baseline(row.series) if relative else None
        for column, point in row.series.points.items():
            if row.series.is_full:
                cell = _mean_cell(report.compared, [point], macro_mean)
            elif baseline is None and relative:
                continue
            else:
                cell = _mean_cell(
                    report.compared,
                    [point, baseline] if baseline else [point],
                    ratio if baseline else macro_mean,
                )
            if cell is not None:
                row.cells[column] = cell

    def gap(best: Series, other: Series, column: float) -> Interval | None:
        return mean_gap(report, best, other, column)

    _mark(report, table, gap, higher_is_better=True)
    return table


def mean_gap(report: Report, one: Series, other: Series, column: float) -> Interval | None:
    """How far one method is ahead of another, in the mean table's terms; None without pairs."""
    points = [series.points[column] for series in (one, other)]
    baselines = [report.baseline(series) for series in (one, other)]
    return ratio_gap(report.compared, points, baselines)


def ratio_gap(
    tasks: Sequence[TaskFacts], points: Sequence[Point], baselines: Sequence[Point | None]
) -> Interval | None:
    """How far one point is ahead of another, each as a fraction of its own full cache.

    Args:
        tasks: Each counts the same.
        points: Two, of one report or of two: prompts are paired by length, seed and index.
        baselines: Their full caches; without them scores are compared.
    """
    pairs = zip(points, baselines, strict=True)
    columns = [p for pair in pairs for p in pair if p is not None]
    statistic = {2: difference, 4: ratio_difference}.get(len(columns))
    strata = _strata(tasks, columns)
    return bootstrap(strata, statistic) if strata and statistic else None


def task_table(report: Report, task: TaskFacts) -> Table:
    """Scores of one task; bits per byte as the difference to the full cache."""
    is_difference = not task.higher_is_better and task.full_score is not None
    table = Table(task, False, is_difference, [Row(series) for series in report.series])
    for row in table.rows:
        baseline = report.baseline(row.series) if is_difference else None
        for column, point in row.series.points.items():
            if is_difference and not row.series.is_full:
                rows = paired(task.name, [point, baseline]) if baseline else NOTHING
                interval = bootstrap([rows], difference) if len(rows) else None
            else:
                scores = paired(task.name, [point])[:, 0]
                interval = mean_interval(scores) if len(scores) else None
            if interval is not None:
                row.cells[column] = Cell(interval)

    def gap(best: Series, other: Series, column: float) -> Interval | None:
        pair = [best.points[column], other.points[column]]
        rows = paired(task.name, pair if task.higher_is_better else pair[::-1])
        return bootstrap([rows], difference) if len(rows) else None

    _mark(report, table, gap, task.higher_is_better)
    return table


def relative_scores(report: Report, task: TaskFacts) -> Table:
    """Scores of one task as fractions of the full cache's, for the curves."""
    table = Table(task, True, False, [Row(series) for series in report.compressed])
    for row in table.rows:
        baseline = report.baseline(row.series)
        for column, point in row.series.points.items():
            rows = paired(task.name, [point, baseline]) if baseline else NOTHING
            if len(rows):
                row.cells[column] = Cell(bootstrap([rows], ratio))
    return table


def _mean_cell(
    tasks: Sequence[TaskFacts], points: Sequence[Point], statistic: Callable[[Array], Array]
) -> Cell | None:
    strata = _strata(tasks, points)
    if not strata:
        return None
    if len(strata) == len(points) == 1:
        interval = mean_interval(strata[0][:, 0])
    else:
        interval = bootstrap(strata, statistic)
    return Cell(interval, len(strata), complete=len(strata) == len(tasks))


def _strata(tasks: Sequence[TaskFacts], points: Sequence[Point]) -> list[Array]:
    strata = [paired(task.name, points) for task in tasks]
    return [rows for rows in strata if len(rows)]


def _mark(
    report: Report,
    table: Table,
    gap: Callable[[Series, Series, float], Interval | None],
    higher_is_better: bool,
) -> None:
    """Mark the best of every column, and what the data do not tell from it."""
    sign = 1 if higher_is_better else -1
    for column in report.columns:
        rivals = [
            (series, cell)
            for series, cell in table.column(column)
            if cell.complete and not math.isnan(cell.interval.value)
        ]
        if len(rivals) < 2:
            continue
        # Between equals the first counts, and series in focus come first.
        best, best_cell = max(rivals, key=lambda rival: sign * rival[1].interval.value)
        best_cell.is_best = True
        for series, cell in rivals:
            if series is best:
                continue
            cell.behind = gap(best, series, column)
            cell.is_tied = cell.behind is None or not cell.behind.excludes(0)
