# SPDX-License-Identifier: Apache-2.0
"""The report on a server to be for people: a line for each check."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ems_vllm.doctor.start.check import StartReport, Status

_VERDICT = {
    Status.OK: "ok: it can start, and nothing is lost",
    Status.UNKNOWN: "ok as far as can be told: some of it only the server knows",
    Status.DEGRADED: "degraded: it can start, and something is lost",
    Status.REFUSED: "refused: it cannot start like this",
}
_COLOUR = {
    Status.OK: "green",
    Status.UNKNOWN: "cyan",
    Status.DEGRADED: "yellow",
    Status.REFUSED: "red",
}


def print_report(out: Console, report: StartReport) -> None:
    """Print it, readable at 80 columns and without colour."""
    table = Table("check", "status", "finding", box=SIMPLE_HEAD, pad_edge=False)
    for check in report.checks:
        finding = Text(check.finding)
        if check.remedy is not None:
            finding.append(f"; {check.remedy}", style="bold")
        table.add_row(check.name, Text(check.status, style=_COLOUR[check.status]), finding)
    out.print(table)
    if report.recipe_is_assumed:
        out.print(Text(f"--kv-compression was not given; {report.recipe!r} is assumed."))
    out.print(Text(_VERDICT[report.status], style="bold"))
