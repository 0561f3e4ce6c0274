# SPDX-License-Identifier: Apache-2.0
"""Draws quality by budget from results of `ems-vllm eval`, the method in focus with its interval.

Usage: python benchmarks/plot_quality.py RESULTS.json... --out docs/figures/quality.svg
"""

from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes
from plot_serving import COLORS, STYLE

from ems_vllm.eval.records.results import EvalResult
from ems_vllm.eval.report.aggregate import Report, aggregate
from ems_vllm.eval.report.compare import Table, mean_table
from ems_vllm.eval.report.verdict import focus

FOCUS = "#D55E00"
OTHERS = [c for c in (*COLORS, "#56B4E9", "#332288", "#882255", "#117733") if c != FOCUS]
LINES = {"vllm": "-", "kvpress": "--"}


def draw(report: Report, table: Table) -> plt.Figure:
    """Score against budget, one line per method and engine."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    ours = focus(report, table)
    methods = [row.series for row in table.rows if row.cells and not row.series.is_full]
    names = list(dict.fromkeys(series.method for series in methods if series is not ours))
    colors = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(names)}
    for row in table.rows:
        series = row.series
        if series.is_full or not row.cells or series.engine not in LINES:
            continue
        budgets = sorted(row.cells)
        cells = [row.cells[budget].interval for budget in budgets]
        in_focus = series is ours
        color = FOCUS if in_focus else colors[series.method]
        axes.plot(
            budgets,
            [cell.value * 100 for cell in cells],
            LINES[series.engine],
            color=color,
            linewidth=2.5 if in_focus else 1.2,
            marker="o" if in_focus else None,
            label=series.label,
            zorder=3 if in_focus else 2,
        )
        if in_focus:
            low, high = ([getattr(cell, end) * 100 for cell in cells] for end in ("low", "high"))
            axes.fill_between(budgets, low, high, color=color, alpha=0.15, linewidth=0)
    _label(axes, report.columns)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def _label(axes: Axes, columns: list[float]) -> None:
    axes.axhline(100, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    ticks = [column for column in columns if column > 0]
    axes.set_xticks(ticks, [f"{100 * tick:.3g} %" for tick in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("budget: entries per kv_head, in percent of the context")
    axes.set_ylabel("score in percent of the full cache's")


def main(
    results: Annotated[list[Path], typer.Argument(help="results.json of one or more runs.")],
    out: Annotated[Path, typer.Option(help="SVG or PNG file.")],
) -> None:
    """Draw quality by budget."""
    report = aggregate([EvalResult.read(path) for path in results])
    with plt.rc_context(STYLE):
        figure = draw(report, mean_table(report))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
