# SPDX-License-Identifier: Apache-2.0
"""The panels of the Grafana dashboard, row by row."""

from __future__ import annotations

import json
from pathlib import Path

from tables.markdown import table

_FILE = Path(__file__).resolve().parents[2] / "deploy/grafana/dashboards/ems-vllm.json"


def panels() -> str:
    rows = []
    for panel in json.loads(_FILE.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            rows.append((f"**{panel['title']}**", ""))
        else:
            rows.append((panel["title"], panel["description"]))
    return table(("panel", "shows"), rows)
