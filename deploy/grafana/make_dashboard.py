# SPDX-License-Identifier: Apache-2.0
"""Writes dashboards/ems-vllm.json: `python deploy/grafana/make_dashboard.py`.

With Grafana's own library for dashboards, which knows the names of all options; what is shown is in
dashboard_panels.py.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from dashboard_panels import ROWS, Panel, Query
from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).parent / "dashboards" / "ems-vllm.json"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# The series that every server has from its start: it tells which models, engines and servers
# there are.
_ALL_SERVERS = "vllm:num_requests_running"
_HEIGHT = 8


def _target(name: str, query: Query, panel: Panel) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.promql).legend_format(query.legend).range()
    target.ref_id(name).datasource(_SOURCE)
    if panel.kind == "heatmap":
        target.format(PromQueryFormat.HEATMAP)
    return target


def _drawn(panel: Panel) -> Any:
    """The panel's own look; what all kinds have in common comes after."""
    if panel.kind == "now":
        calculation = common.ReduceDataOptions().calcs(["lastNotNull"])
        # One colour: what is much depends on the model and the traffic.
        plain = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE)
        return (
            stat.Panel()
            .thresholds(plain.steps([Threshold(value=None, color="blue")]))
            .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
            .reduce_options(calculation)
            .graph_mode(options.BigValueGraphMode.AREA)
            .color_mode(options.BigValueColorMode.VALUE)
            .no_value("-")
        )
    if panel.kind == "heatmap":
        return (
            heatmap.Panel()
            .calculate(False)
            .y_axis(heatmap.YAxisConfig().unit(panel.unit))
            .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues"))
        )
    lines = timeseries.Panel().show_points(options.VisibilityMode.NEVER).fill_opacity(10)
    lines.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    lines.legend(common.VizLegendOptions().show_legend(True).placement("bottom").calcs(["mean"]))
    if panel.kind == "stacked":
        lines.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    return lines


def _panel(panel: Panel, number: int) -> Any:
    drawn = _drawn(panel).title(panel.title).description(panel.description).unit(panel.unit)
    drawn.id(number).datasource(_SOURCE).span(panel.width).height(_HEIGHT).min(0)
    if panel.top is not None:
        drawn.max(panel.top)
    for name, query in zip(ascii_uppercase, panel.queries, strict=False):
        drawn.with_target(_target(name, query, panel))
    return drawn


def _choice(label: str, title: str, among: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(_SOURCE)
        .query(f"label_values({among}, {label})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def build() -> str:
    """The dashboard, as JSON."""
    made = (
        dashboard.Dashboard("vLLM with KV-cache compression")
        .uid("ems-vllm")
        .description("What compression does and what it gains, beside vLLM's own figures.")
        .tags(["vllm", "ems-vllm"])
        .time("now-1h", "now")
        .refresh("15s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_choice("model_name", "Model", _ALL_SERVERS))
        .with_variable(
            _choice("instance", "Server", f'{_ALL_SERVERS}{{model_name=~"$model_name"}}')
        )
        .with_variable(_choice("engine", "Engine", f'{_ALL_SERVERS}{{model_name=~"$model_name"}}'))
    )
    numbers = count(1)
    for row in ROWS:
        made.with_row(dashboard.Row(row.title).id(next(numbers)))
        for panel in row.panels:
            made.with_panel(_panel(panel, next(numbers)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
