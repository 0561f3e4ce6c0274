# SPDX-License-Identifier: Apache-2.0
"""The metrics of a server, and the panels of the Grafana dashboard, row by row."""

from __future__ import annotations

import json
from pathlib import Path

from ems_vllm.engine.frontend.metric_catalogue import (
    COUNTERS,
    ERRORS,
    GAUGES,
    HISTOGRAM,
    REFUSED,
    REQUESTS,
)
from tables.markdown import table

_DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/dashboards/ems-vllm.json"


def metrics() -> str:
    counters = {
        f"{REQUESTS.name}_total{{outcome=...}}": REQUESTS,
        f"{REFUSED.name}_total{{reason=...}}": REFUSED,
    } | {f"{metric.name}_total": metric for metric in COUNTERS.values()}
    gauges = {metric.name: metric for metric in GAUGES.values()}
    histograms = {HISTOGRAM.name: HISTOGRAM, f"{ERRORS.name}{{layers=...}}": ERRORS}
    kinds = {"counter": counters, "gauge": gauges, "histogram": histograms}
    return table(
        ("metric", "kind", ""),
        (
            (f"`{name}`", kind, metric.help)
            for kind, metrics in kinds.items()
            for name, metric in metrics.items()
        ),
    )


def panels() -> str:
    rows = []
    for panel in json.loads(_DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            rows.append((f"**{panel['title']}**", ""))
        else:
            rows.append((panel["title"], panel["description"]))
    return table(("panel", "shows"), rows)
