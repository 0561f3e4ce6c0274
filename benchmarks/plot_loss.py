# SPDX-License-Identifier: Apache-2.0
"""Draws what is lost by budget, from a result of `python -m ems_vllm.eval.lab` and of peers.

Usage: python benchmarks/plot_loss.py LAB.json ... --peers PEERS.json --out docs/figures/loss.svg
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes
from plot_serving import STYLE

FOCUS = "ems"
OURS = {
    FOCUS: ("EMS", "#D55E00"),
    "ems, profile": ("EMS, profile of the layers", "#E69F00"),
    "snapkv": ("SnapKV", "#0072B2"),
    "h2o": ("H2O", "#009E73"),
    "streaming_llm": ("StreamingLLM", "#999933"),
}
PEERS = {
    "chunkkv_snapkv": ("kvpress: ChunkKV", "#56B4E9"),
    "compactor": ("kvpress: Compactor", "#332288"),
    "keydiff": ("kvpress: KeyDiff", "#CC79A7"),
    "kvzip": ("kvpress: KVzip, reads twice", "#999999"),
}
PANELS = {
    "last": "question at the end of the prompt",
    "later": "question after compression",
    "continuation": "running text",
}


def draw(results: Sequence[dict[str, Any]], peers: dict[str, Any]) -> plt.Figure:
    """Loss above the full cache's, one panel for each way to ask, one line for each method.

    Args:
        results: On the same prompts; budgets are the first one's.
        peers: Losses by method, budget and prompt.
    """
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.5, 3.4), layout="constrained")
    budgets = [float(budget) for budget in results[0]["budgets"]]
    summaries = [summary for result in results for summary in result["summaries"]]
    for axes, (group, title) in zip(panels, PANELS.items(), strict=True):
        for variant, (label, color) in OURS.items():
            found = {
                float(summary["budget"]): summary["loss_above_full"]
                for summary in summaries
                if summary["variant"] == variant and summary["group"] == group
            }
            at = [budget for budget in budgets if budget in found]
            line = [found[budget] for budget in at]
            focused = variant.startswith(FOCUS)
            axes.plot(
                at, line, color=color, marker="o" if focused else None,
                linewidth=2.5 if focused else 1.2, label=label, zorder=3 if focused else 2,
            )  # fmt: skip
        for press, (label, color) in PEERS.items():
            # Such as compactor-0.25.
            of_press = {
                float(name.rpartition("-")[2]): mean(losses[group].values())
                for name, losses in peers.items()
                if name.rpartition("-")[0] == press and group in losses
            }
            at = [budget for budget in budgets if budget in of_press]
            line = [of_press[budget] for budget in at]
            axes.plot(at, line, "--", color=color, linewidth=1.2, marker=".", label=label)
        _label(axes, budgets, title)
    panels[0].set_ylabel("nats per token above the full cache")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _label(axes: Axes, budgets: list[float], title: str) -> None:
    axes.axhline(0, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{100 * budget:.3g} %" for budget in budgets])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("entries kept")
    axes.set_title(title, fontsize=9)


def main(
    results: Annotated[list[Path], typer.Argument(help="Of the lab, on the same prompts.")],
    out: Annotated[Path, typer.Option(help="SVG or PNG file.")],
    peers: Annotated[Path | None, typer.Option(help="Losses of peers on the same prompts.")] = None,
) -> None:
    """Draw what is lost by budget."""
    read = [json.loads(result.read_text(encoding="utf-8")) for result in results]
    losses = {} if peers is None else json.loads(peers.read_text(encoding="utf-8"))["losses"]
    with plt.rc_context(STYLE):
        figure = draw(read, losses)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


if __name__ == "__main__":
    typer.run(main)
