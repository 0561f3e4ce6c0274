# SPDX-License-Identifier: Apache-2.0
"""Lines of the report: on the screen, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """One provider of one case.

    Attributes:
        floor_ms: Least time by the measured ceilings, for the bytes and FLOPs it cannot do without.
        bound: Which of the two that is, "copy" or "matmul".
        of_ceiling: floor_ms over the time taken.
        target: What the time is compared with, and which share of it is allowed.
        of_target: Time allowed over time taken; 1 or more meets the target.
    """

    op: str
    variant: str
    provider: str
    model: str
    length: int
    num_rows: int
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int
    num_bytes: float
    flops: float
    floor_ms: float | None
    bound: str
    of_ceiling: float | None
    target: str
    target_ms: float | None
    of_target: float | None


HEADER = (
    f"{'op':30} {'variant':32} {'provider':18} {'length':>6} {'rows':>4} {'dtype':8} "
    f"{'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'of ceiling':>10} {'of target':>9}"
)


def text(line: Line) -> str:
    """One line of the table."""
    return (
        f"{line.op:30} {line.variant:32} {line.provider:18} {line.length:6} {line.num_rows:4} "
        f"{line.dtype:8} {line.p20_ms:9.3f} {line.p50_ms:9.3f} {line.p80_ms:9.3f} "
        f"{_share(line.of_ceiling):>10} {_share(line.of_target):>9}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_json(path: Path, described: dict[str, Any], lines: Sequence[Line]) -> None:
    """Everything, with where and how it was measured."""
    report = {**described, "lines": [asdict(line) for line in lines]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """The lines alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
