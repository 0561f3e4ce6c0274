# SPDX-License-Identifier: Apache-2.0
"""What the figures say, in sentences that are computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ems_vllm.eval.report.compare import Cell, Table, mean_gap
from ems_vllm.eval.report.facts import MIN_FULL_SCORE, Report, Series
from ems_vllm.eval.report.stats import Interval
from ems_vllm.eval.report.wording import bounds, count, listed, percent, printable, value

# The budget the headline is about, if it was measured; else the nearest.
HEADLINE_BUDGET = 0.06
# What counts as keeping the full cache's quality.
KEEPS = 0.95
# Of the same method in other engines and runs.
MAX_SIBLINGS = 3


@dataclass(frozen=True)
class Tile:
    """A number to be read at a glance."""

    number: str
    caption: str


def focus(report: Report, table: Table) -> Series | None:
    """The method the report is about: EMS, on vLLM if there; without EMS the best on average."""
    rows = [row for row in table.rows if row.cells and not row.series.is_full]
    if not rows:
        return None
    ours = [row for row in rows if row.series.in_focus]
    if ours:
        return max(ours, key=lambda row: row.series.engine == "vllm").series

    def average(cells: list[Cell]) -> float:
        return sum(cell.interval.value for cell in cells) / len(cells)

    return max(rows, key=lambda row: average(list(row.cells.values()))).series


def headline_column(report: Report, table: Table, series: Series) -> float | None:
    """The series' budget nearest to the headline's."""
    measured = [c for c in report.columns if c > 0 and table.cell(series, c) is not None]
    return min(measured, key=lambda c: abs(math.log(c / HEADLINE_BUDGET)), default=None)


def verdict(report: Report, table: Table) -> list[str]:
    """The one paragraph to read, and what has to be said with it."""
    return [*_claims(report, table), *_caveats(report, table)]


def tiles(report: Report, table: Table) -> list[Tile]:
    """The verdict in a few numbers."""
    series = focus(report, table)
    column = headline_column(report, table, series) if series else None
    if series is None or column is None:
        return []
    cell = table.cell(series, column)
    assert cell is not None
    name = _name(series)
    unit = "\N{NO-BREAK SPACE}%" if table.relative else ""
    of = "of the full cache's score" if table.relative else "mean score"
    found = [
        Tile(
            value(cell.interval, relative=table.relative) + unit,
            f"{of}, {name} at a budget of {percent(column)}",
        )
    ]
    rank = _ranks(report, table, series)
    if rank:
        good = sum(cell.is_best or cell.is_tied for _, cell in rank)
        found.append(Tile(f"{good} of {len(rank)}", "budgets at which it is best or within noise"))
    full, own = report.baseline(series), series.points[column]
    if full is not None:
        dense, ours = full.serving.kv_bytes_per_request, own.serving.kv_bytes_per_request
        if dense and ours:
            found.append(
                Tile(_times(dense / ours), f"less KV cache per request at {percent(column)}")
            )
        before, after = full.serving.output_tokens_per_s, own.serving.output_tokens_per_s
        if before and after:
            found.append(Tile(_times(after / before), f"the throughput at {percent(column)}"))
    return found


def _claims(report: Report, table: Table) -> list[str]:
    series = focus(report, table)
    column = headline_column(report, table, series) if series else None
    if series is None or column is None:
        return ["No compressed method answered a task that can be compared."]
    name = _name(series)
    cell = table.cell(series, column)
    assert cell is not None
    estimate = value(cell.interval, relative=table.relative)
    interval = bounds(cell.interval, relative=table.relative)
    within = f" (95 % confidence: {interval})" if interval else ""
    at = f"At a budget of {percent(column)}"
    found = [
        f"{at}, {name} keeps {estimate} % of the full cache's score{within}."
        if table.relative
        else f"{at}, {name} scores {estimate}{within}; no full cache was run to compare with."
    ]
    found += _rank_claims(report, table, series)
    found += _agreement(report, table, series)
    if table.relative:
        kept = [
            c
            for c in report.columns
            if (other := table.cell(series, c)) is not None and other.interval.value >= KEEPS
        ]
        found.append(
            f"The smallest budget at which it keeps {percent(KEEPS)} is {percent(kept[0])}."
            if kept
            else f"It keeps {percent(KEEPS)} at no budget measured."
        )
    return found


def _rank_claims(report: Report, table: Table, series: Series) -> list[str]:
    rank = _ranks(report, table, series)
    if not rank:
        return ["There is no other method to compare it with."]
    good = [column for column, cell in rank if cell.is_best or cell.is_tied]
    alone = [column for column, cell in rank if cell.is_best and _is_alone(table, series, column)]
    found = [
        f"It is the best or within noise of the best at {len(good)} of "
        f"{count(len(rank), 'budget')}"
        + (f", and clearly the best at {listed([percent(c) for c in alone])}." if alone else ".")
    ]
    for column, cell in rank:
        if column not in good and cell.behind is not None:
            best = next(other for other, each in table.column(column) if each.is_best)
            ahead = value(cell.behind, relative=table.relative)
            interval = bounds(cell.behind, relative=table.relative)
            points = f"{ahead} points" if table.relative else ahead
            found.append(f"At {percent(column)}, {_name(best)} is ahead by {points} ({interval}).")
    return found


def _is_alone(table: Table, series: Series, column: float) -> bool:
    """Whether every other method is behind; the same one in another engine is no rival."""
    rivals = [cell for each, cell in table.column(column) if each.method != series.method]
    return bool(rivals) and not any(cell.is_tied for cell in rivals)


def _agreement(report: Report, table: Table, series: Series) -> list[str]:
    """Whether the method in focus does as well in other engines and runs."""
    found = []
    for other in report.compressed:
        if other is series or other.method != series.method:
            continue
        gaps = [
            (column, gap)
            for column in report.columns
            if {column} <= series.points.keys() & other.points.keys()
            and (gap := mean_gap(report, series, other, column)) is not None
        ]
        same = [column for column, gap in gaps if not gap.excludes(0)]
        if not gaps:
            continue
        found.append(
            f"{printable(other.label)} agrees with {printable(series.label)} within noise at "
            f"{len(same)} of {count(len(gaps), 'budget')}"
            + "".join(
                f"; at {percent(column)} it differs by "
                f"{value(_negated(gap), relative=table.relative, signed=True)}"
                for column, gap in gaps
                if column not in same
            )
            + "."
        )
    return found[:MAX_SIBLINGS]


def _caveats(report: Report, table: Table) -> list[str]:
    found = []
    failed = [
        f"{printable(task.name)} ({task.full_score:.2f})"
        for task in report.tasks
        if task.excluded and task.higher_is_better and task.full_score is not None
    ]
    if failed:
        found.append(
            f"Left out of every mean, because the full cache itself scores below "
            f"{MIN_FULL_SCORE:g}: {listed(failed)}."
        )
    if len({run.model for run in report.runs}) > 1:
        found.append("The runs are of different models: compare relative scores only.")
    num_errors = sum(point.num_errors for s in report.series for point in s.points.values())
    if num_errors:
        found.append(f"{count(num_errors, 'request')} failed and count as wrong answers.")
    partial = [
        row.series for row in table.rows if any(not cell.complete for cell in row.cells.values())
    ]
    if partial:
        found.append(
            f"{count(len(partial), 'method')} did not run every task and cannot be the best."
        )
    sizes = [{cell.interval.n for cell in row.cells.values()} for row in table.rows if row.cells]
    fewer = [each for each in sizes if min(each) < max(map(max, sizes))]
    if fewer and not partial:
        found.append(
            f"{count(len(fewer), 'method')} answered fewer prompts than others; differences are "
            "taken on the prompts that both answered."
        )
    return found


def _ranks(report: Report, table: Table, series: Series) -> list[tuple[float, Cell]]:
    """The series' cells in columns where it has rivals."""
    cells = [(column, table.cell(series, column)) for column in report.columns]
    return [
        (column, cell)
        for column, cell in cells
        if cell is not None and (cell.is_best or cell.behind is not None or cell.is_tied)
    ]


def _negated(gap: Interval) -> Interval:
    return Interval(-gap.value, -gap.high, -gap.low, gap.n)


def _name(series: Series) -> str:
    return "EMS" if series.in_focus else printable(series.label)


def _times(factor: float) -> str:
    return f"{factor:.3g}\N{MULTIPLICATION SIGN}"
