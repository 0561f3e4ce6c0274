# SPDX-License-Identifier: Apache-2.0
"""One run as data, several as a table and as a file."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from serving.load import Sample
from serving.summary import Summary

DENSE = "dense"
_LABELS = {
    "peak_blocks": "peak blocks",
    "steady_blocks_per_request": "steady blocks per request",
    "peak_running": "most requests running",
    "num_preemptions": "preemptions",
    "output_tokens_per_s": "output tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "ttft_s.median": "TTFT, s, median",
    "ttft_s.p95": "TTFT, s, p95",
    "tpot_ms.median": "TPOT, ms, median",
    "tpot_ms.p95": "TPOT, ms, p95",
    "wall_s": "wall time, s",
}
_COUNTS = ("peak_blocks", "peak_running", "num_preemptions")


@dataclass(frozen=True)
class Run:
    """One configuration and what came of it."""

    case: str
    recipe: str
    summary: Summary
    samples: Sequence[Sample]

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "recipe": self.recipe,
            **_rounded(asdict(self.summary)),
            "timeline": {
                "time_s": [round(sample.time, 2) for sample in self.samples],
                "used_blocks": [sample.pool.num_used_blocks for sample in self.samples],
                "running": [sample.pool.num_running for sample in self.samples],
                "waiting": [sample.pool.num_waiting for sample in self.samples],
            },
        }


def ratios(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every run's figures divided by those of the dense run of its case."""
    dense = {run.case: run.summary for run in runs if run.recipe == DENSE}
    rows = []
    for run in runs:
        if run.recipe == DENSE or run.case not in dense:
            continue
        row: dict[str, Any] = {"case": run.case, "recipe": run.recipe}
        for name in _LABELS:
            value, base = (attrgetter(name)(s) for s in (run.summary, dense[run.case]))
            row[name] = round(value / base, 3) if value is not None and base else None
        rows.append(row)
    return rows


def print_tables(console: Console, runs: Sequence[Run]) -> None:
    """One table per case: a row per figure, a column per recipe, and the ratios to dense."""
    compared = {(row["case"], row["recipe"]): row for row in ratios(runs)}
    for case in dict.fromkeys(run.case for run in runs):
        of_case = [run for run in runs if run.case == case]
        table = Table(title=f"{case}: a pool of {of_case[0].summary.num_blocks} blocks")
        table.add_column("")
        columns = []
        for run in of_case:
            table.add_column(run.recipe, justify="right")
            columns.append(_cells(run.summary))
            if (case, run.recipe) in compared:
                table.add_column(f"/ {DENSE}", justify="right")
                ratio = compared[case, run.recipe]
                columns.append({name: _number(ratio.get(name), 2) for name in columns[0]})
        for name, label in _LABELS.items():
            table.add_row(label, *(column[name] for column in columns))
        console.print(table)


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON, every list of numbers on one line."""
    text = json.dumps(report, indent=2)
    text = re.sub(r"\[[\s\d.,-]*\]", lambda match: " ".join(match[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _cells(summary: Summary) -> dict[str, str]:
    return {
        name: _number(attrgetter(name)(summary), 0 if name in _COUNTS else 1) for name in _LABELS
    }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value
