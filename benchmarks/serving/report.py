# SPDX-License-Identifier: Apache-2.0
"""One run as data, several as a table and as a file."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from serving.load import Sample
from serving.summary import Summary

DENSE = "dense"
# Figures of which the ratio to the dense run is reported.
_RATIOS = {
    "peak_blocks": lambda s: s.peak_blocks,
    "steady_blocks_per_request": lambda s: s.steady_blocks_per_request,
    "output_tokens_per_s": lambda s: s.output_tokens_per_s,
    "decode_tokens_per_s": lambda s: s.decode_tokens_per_s,
    "ttft_s.median": lambda s: s.ttft_s.median,
    "tpot_ms.median": lambda s: s.tpot_ms.median,
    "wall_s": lambda s: s.wall_s,
}


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
        for name, get in _RATIOS.items():
            value, base = get(run.summary), get(dense[run.case])
            row[name] = round(value / base, 3) if value is not None and base else None
        rows.append(row)
    return rows


def print_tables(console: Console, runs: Sequence[Run]) -> None:
    """The figures, then the ratios to dense."""
    table = Table(title="Serving")
    for name in ("case", "recipe"):
        table.add_column(name)
    for name in (
        "pool\nblocks",
        "peak\nblocks",
        "steady blocks\nper request",
        "most\nrunning",
        "preemp-\ntions",
        "output\ntokens/s",
        "decode\ntokens/s",
        "TTFT s\nmedian / p95",
        "TPOT ms\nmedian / p95",
        "wall\ns",
    ):
        table.add_column(name, justify="right")
    for run in runs:
        s = run.summary
        table.add_row(
            run.case,
            run.recipe,
            str(s.num_blocks),
            str(s.peak_blocks),
            _number(s.steady_blocks_per_request),
            str(s.peak_running),
            str(s.num_preemptions),
            _number(s.output_tokens_per_s),
            _number(s.decode_tokens_per_s),
            f"{s.ttft_s.median:.1f} / {s.ttft_s.p95:.1f}",
            f"{s.tpot_ms.median:.0f} / {s.tpot_ms.p95:.0f}",
            _number(s.wall_s),
        )
    console.print(table)
    compared = ratios(runs)
    if not compared:
        return
    table = Table(title="Ratio to dense")
    for name in compared[0]:
        table.add_column(name.replace("_", " "), justify="left" if name in ("case", "recipe") else "right")
    for row in compared:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    console.print(table)


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON, every list of numbers on one line."""
    text = json.dumps(report, indent=2)
    text = re.sub(r"\[[\s\d.,-]*\]", lambda match: " ".join(match[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value
