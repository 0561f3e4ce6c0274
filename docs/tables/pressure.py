# SPDX-License-Identifier: Apache-2.0
"""What compression costs while the pool has room for everything."""

from __future__ import annotations

import json
from pathlib import Path

from tables.markdown import table

_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/pressure-cpu.json"
_NAMES = {"dense": "dense", "pressure": "`when: pressure`", "always": "`when: always`"}


def pressure() -> str:
    rows = json.loads(_RESULTS.read_text(encoding="utf-8"))["configurations"]
    return table(
        ("", "CPU seconds", "of dense", "from round to round", "compactions"),
        (
            (
                _NAMES[row["configuration"]],
                f"{row['cpu_seconds']:.2f}",
                f"{row['cpu_ratio']:.3f}",
                f"{min(row['every_cpu_ratio']):.3f} to {max(row['every_cpu_ratio']):.3f}",
                str(row["compactions"]),
            )
            for row in rows
        ),
    )
