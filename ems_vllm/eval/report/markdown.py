# SPDX-License-Identifier: Apache-2.0
"""The tables of a report in Markdown, for pull requests and documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ems_vllm.eval.report.compare import Cell, Table
from ems_vllm.eval.report.facts import Report
from ems_vllm.eval.report.section import Section, SideBySide, comparison, side_by_side
from ems_vllm.eval.report.verdict import verdict
from ems_vllm.eval.report.wording import bounds, count, percent, printable, value


def markdown(parts: Sequence[Section]) -> str:
    """The document, a part for each protocol."""
    several = len(parts) > 1
    models = dict.fromkeys(run.title for part in parts for run in part.report.runs)
    blocks = [f"# Evaluation of {escape(', '.join(models))}"]
    if several:
        blocks.append(escape(" ".join(comparison(parts))))
        blocks.append("## Protocols side by side")
        blocks.append(f"{_unit(parts[0].mean)}, mean over the tasks compared in each protocol.")
        blocks += [_side_by_side(parts, table) for table in side_by_side(parts)]
    for part in parts:
        if several:
            blocks.append(f"## {part.title}")
            blocks.append(f"{part.description[0].upper()}{part.description[1:]}.")
        blocks += _section(part, "###" if several else "##")
    blocks.append(
        "Intervals: 95 %. **Bold**: the best estimate at this budget; `~`: not told from the best "
        "by a paired bootstrap over prompts."
    )
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section(part: Section, heading: str) -> list[str]:
    report, mean = part.report, part.mean
    blocks = [escape(" ".join(verdict(report, mean)))]
    blocks += [f"{heading} Mean over tasks", _mean_caption(report, mean), _table(report, mean)]
    for table in part.tables:
        task = table.task
        assert task is not None
        caption = count(task.num_prompts, "prompt")
        if table.is_difference:
            caption += ", difference to the full cache, less is better"
        if task.excluded:
            caption += f". Not in the mean: {task.excluded}"
        blocks += [f"{heading} {escape(task.name)}", f"{caption}.", _table(report, table)]
    return blocks


def _side_by_side(parts: Sequence[Section], table: SideBySide) -> str:
    head = [f"method, {percent(table.column)}", *(part.title for part in parts)]
    lines = [_line(head), _line(["---", *["---:"] * len(parts)])]
    for series, cells in table.rows:
        texts = [
            _cell(part.mean, cell, table.column) for part, cell in zip(parts, cells, strict=True)
        ]
        lines.append(_line([escape(series.label), *texts]))
    return "\n".join(lines)


def escape(text: str) -> str:
    """Foreign text inside a table's cell or a heading: nothing of it is markup."""
    text = printable(text).replace("\n", " ").replace("\\", "\\\\")
    for char in "|*_`[]":
        text = text.replace(char, f"\\{char}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _unit(mean: Table) -> str:
    return "Percent of the full cache's score" if mean.relative else "Score"


def _mean_caption(report: Report, mean: Table) -> str:
    names = ", ".join(escape(task.name) for task in report.compared) or "no task"
    return f"{_unit(mean)}, mean over {names}."


def _table(report: Report, table: Table) -> str:
    with_full = bool(report.fulls)
    head = ["method", *(["full cache"] if with_full else []), *map(percent, report.columns)]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in table.rows:
        if row.cells:
            keys = [*([None] if with_full else []), *report.columns]
            cells = [_cell(table, row.cells.get(key), key) for key in keys]
            lines.append(_line([escape(row.series.label), *cells]))
    return "\n".join(lines)


def _cell(table: Table, cell: Cell | None, column: float | None) -> str:
    if cell is None:
        return ""
    # The full cache's own score is absolute in every table.
    relative = table.relative and column is not None
    signed = table.is_difference and column is not None
    text = value(cell.interval, relative=relative, signed=signed)
    if cell.is_best:
        text = f"**{text}**"
    elif cell.is_tied:
        text = f"~ {text}"
    interval = bounds(cell.interval, relative=relative, signed=signed)
    return f"{text} ({interval})" if interval else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
