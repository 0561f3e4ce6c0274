# SPDX-License-Identifier: Apache-2.0
"""Draws what every method loses, from the result that docs/methods.md shows.

Usage: python benchmarks/plot_methods.py LAB.json --out docs/figures/methods.svg
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer
from plot_serving import STYLE

from ems_vllm.config import recipes

PANELS = {
    "last": "question at the end",
    "first": "question first",
    "later": "question after compression",
    "continuation": "running text",
}
FOCUS = "ems"
COLOURS = ("#d95f02", "#1b6ca8")


def draw(result: dict[str, Any]) -> plt.Figure:
    """A row for each method, a dot for each budget; the least loss of questions on top.

    A triangle at the edge is a loss beyond it.
    """
    found = {
        (one["variant"], one["budget"], one["group"]): one["loss_above_full"]
        for one in result["summaries"]
    }
    budgets = result["budgets"]
    names = [name for name in recipes.names() if (name, budgets[0], "last") in found]

    def asked(name: str) -> float:
        return sum(found[name, budget, group] for budget in budgets for group in list(PANELS)[:3])

    names.sort(key=asked, reverse=True)
    size = (10.5, 1.2 + 0.21 * len(names))
    figure, panels = plt.subplots(1, len(PANELS), figsize=size, sharey=True, layout="constrained")
    rows = range(len(names))
    for axes, (group, title) in zip(panels, PANELS.items(), strict=True):
        losses = [[found[name, budget, group] for name in names] for budget in budgets]
        # One method that is far behind all others would hide what these have apart.
        edge = 1.15 * sorted(max(pair) for pair in zip(*losses, strict=True))[-2]
        beyond = [
            (edge, row) for row, pair in enumerate(zip(*losses, strict=True)) if max(pair) > edge
        ]
        losses = [[min(loss, edge) for loss in of_budget] for of_budget in losses]
        axes.hlines(rows, *losses, color="#cccccc", linewidth=1, zorder=1)
        for budget, colour, marker, of_budget in zip(
            budgets, COLOURS, ("o", "s"), losses, strict=True
        ):
            label = f"{float(budget):.0%} of the cache"
            axes.plot(of_budget, rows, marker, color=colour, markersize=4, label=label)
        for place in beyond:
            axes.plot(*place, ">", color=COLOURS[0], markersize=7)
        axes.tick_params(left=False)
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color="black", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("loss, nats per token")
    panels[0].set_yticks(list(rows), names)
    for label in panels[0].get_yticklabels():
        if label.get_text() == FOCUS:
            label.set_fontweight("bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def main(result: Path, out: Annotated[Path, typer.Option()]) -> None:
    with plt.rc_context(STYLE):
        figure = draw(json.loads(result.read_text(encoding="utf-8")))
        figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
