# SPDX-License-Identifier: Apache-2.0
"""The advice for people, readable at 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ems_vllm.advise.report import AdviceReport
from ems_vllm.advise.rows import Rows, arrivals, lengths, notes, quality, traffic


def print_report(out: Console, report: AdviceReport) -> None:
    """Print it; the suggestion comes last."""
    out.print(Text(traffic(report)))
    for rows in (lengths(report), arrivals(report), quality(report)):
        if rows is not None:
            out.print(_table(rows))
    for note in notes(report):
        out.print(Text(note), style="dim")
    suggestion = report.suggestion
    size = f": {suggestion.budget}" if suggestion.budget else ""
    out.print()
    out.print(Text(f"{suggestion.verdict}{size}"), style="bold")
    for sentence in suggestion.sentences:
        out.print(Text(sentence))
    # In one piece, so that it can be copied.
    out.print(Text(suggestion.command), soft_wrap=True)


def _table(rows: Rows) -> Table:
    table = Table(title=rows.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(rows.head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows.body:
        table.add_row(*_marked(row, rows.chosen))
    return table


def _marked(row: Sequence[str], chosen: str | None) -> Iterator[Text]:
    style = "bold" if row[0] == chosen else ""
    for cell in row:
        yield Text(cell, style=style)
