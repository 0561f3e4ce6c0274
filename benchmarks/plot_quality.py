# SPDX-License-Identifier: Apache-2.0
"""Draws quality by budget from results of `ems-vllm eval`, the method in focus with its interval.

Usage: python benchmarks/plot_quality.py RESULTS.json... --method "ems (vllm)=EMS" --method ...
--out docs/figures/quality.svg
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer
from curves import MOST_CURVES, Curve, draw_curves, label_budgets, label_ends
from plot_serving import STYLE

from ems_vllm.eval.records.results import EvalResult
from ems_vllm.eval.report.aggregate import Report, aggregate
from ems_vllm.eval.report.compare import Table, mean_table
from ems_vllm.eval.report.style import styles

# Right of the last budget, for labels.
_ROOM = 2.4


def draw(report: Report, table: Table, methods: Mapping[str, str]) -> plt.Figure:
    """Score against budget, one curve per method.

    Args:
        methods: What is written beside a curve, by the label of its series.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    curves = _curves(table, methods)
    axes.axhline(100, color="black", linestyle=":", linewidth=1)
    draw_curves(axes, curves)
    budgets = [column for column in report.columns if column > 0]
    label_budgets(axes, budgets)
    axes.set_xlim(budgets[0] / 1.1, budgets[-1] * _ROOM)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("entries per kv_head, in percent of the context")
    axes.set_ylabel("score in percent of the full cache's")
    label_ends(axes, curves, "right")
    return figure


def _curves(table: Table, methods: Mapping[str, str]) -> list[Curve]:
    rows = {row.series.label: row for row in table.rows if row.cells and not row.series.is_full}
    missing = methods.keys() - rows.keys()
    if missing:
        known = ", ".join(map(repr, rows))
        raise typer.BadParameter(f"no series {sorted(missing)}; there are {known}")
    chosen = [rows[label] for label in methods]
    found = []
    for row, style in zip(chosen, styles([row.series for row in chosen]), strict=True):
        budgets = sorted(row.cells)
        cells = [row.cells[budget].interval for budget in budgets]
        low, high = (
            [getattr(cell, end) * 100 for cell in cells] if style.emphasised else []
            for end in ("low", "high")
        )
        scores = [cell.value * 100 for cell in cells]
        found.append(Curve(methods[row.series.label], style, budgets, scores, low, high))
    return found


def main(
    results: Annotated[list[Path], typer.Argument(help="results.json of one or more runs.")],
    method: Annotated[
        list[str], typer.Option(help=f"SERIES=LABEL, as 'ems (vllm)=EMS'; up to {MOST_CURVES}.")
    ],
    out: Annotated[Path, typer.Option(help="SVG or PNG file.")],
) -> None:
    """Draw quality by budget."""
    if len(method) > MOST_CURVES:
        raise typer.BadParameter(f"{len(method)} methods: choose at most {MOST_CURVES}")
    methods = {series: label or series for series, _, label in (m.partition("=") for m in method)}
    report = aggregate([EvalResult.read(path) for path in results])
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names within the file depend on the style's salt, also while it is written.
    with plt.rc_context(STYLE):
        figure = draw(report, mean_table(report), methods)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
