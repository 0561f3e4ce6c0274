# SPDX-License-Identifier: Apache-2.0
"""One protocol of a report, with its tables; and the protocols side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.eval.questions.protocol import DESCRIPTIONS, TITLES
from ems_vllm.eval.records.results import EvalResult
from ems_vllm.eval.report.aggregate import aggregate, protocols
from ems_vllm.eval.report.compare import Cell, Table, mean_table, ratio_gap, task_table
from ems_vllm.eval.report.facts import Report, Series
from ems_vllm.eval.report.stats import Interval
from ems_vllm.eval.report.verdict import focus, headline_column
from ems_vllm.eval.report.wording import bounds, percent, printable, value


@dataclass(frozen=True)
class Section:
    """One protocol.

    Attributes:
        mean: Over the tasks compared.
        tables: One for every task.
    """

    report: Report
    mean: Table
    tables: list[Table]

    @property
    def title(self) -> str:
        return TITLES.get(self.report.protocol, self.report.protocol)

    @property
    def description(self) -> str:
        return DESCRIPTIONS.get(self.report.protocol, "")


@dataclass(frozen=True)
class SideBySide:
    """All methods at one budget: a cell for every protocol, None where there is none."""

    column: float
    rows: list[tuple[Series, list[Cell | None]]]


def sections(results: Sequence[EvalResult]) -> list[Section]:
    """One for each protocol that was asked in."""
    found = []
    for protocol in protocols(results):
        report = aggregate(results, protocol)
        tables = [task_table(report, task) for task in report.tasks]
        found.append(Section(report, mean_table(report), tables))
    return found


def side_by_side(parts: Sequence[Section]) -> list[SideBySide]:
    """The means of every protocol, a table for every budget; nothing for a single protocol."""
    if len(parts) < 2:
        return []
    columns = sorted({column for part in parts for column in part.report.columns})
    found = []
    for column in columns:
        rows: dict[str, tuple[Series, list[Cell | None]]] = {}
        for i, part in enumerate(parts):
            for series, cell in part.mean.column(column):
                _, cells = rows.setdefault(series.label, (series, [None] * len(parts)))
                cells[i] = cell
        found.append(SideBySide(column, list(rows.values())))
    return found


def comparison(parts: Sequence[Section]) -> list[str]:
    """What the place of the question costs the method in focus, against the first protocol."""
    if len(parts) < 2:
        return []
    base = parts[0]
    ours = focus(base.report, base.mean)
    column = headline_column(base.report, base.mean, ours) if ours else None
    if ours is None or column is None:
        return []
    found = []
    for part in parts[1:]:
        gap = _gap(base, part, ours, column)
        if gap is None:
            continue
        name = "EMS" if ours.in_focus else printable(ours.label)
        points = " points" if base.mean.relative else ""
        interval = bounds(gap, relative=base.mean.relative, signed=True)
        within = f" ({interval})" if interval else ""
        change = value(gap, relative=base.mean.relative, signed=True)
        verdict = "" if gap.excludes(0) else "; this is within noise"
        found.append(
            f"{part.title} instead of {base.title[0].lower()}{base.title[1:]} changes {name} at "
            f"{percent(column)} by {change}{points}{within}, on the same documents{verdict}."
        )
    return found


def _gap(base: Section, part: Section, ours: Series, column: float) -> Interval | None:
    """How far one method is ahead of itself in another protocol, in pairs of samples."""
    own = next((s for s in part.report.compressed if s.label == ours.label), None)
    if own is None or column not in own.points:
        return None
    compared = {task.name for task in base.report.compared}
    tasks = [task for task in part.report.compared if task.name in compared]
    baselines = [part.report.baseline(own), base.report.baseline(ours)]
    return ratio_gap(tasks, [own.points[column], ours.points[column]], baselines)
