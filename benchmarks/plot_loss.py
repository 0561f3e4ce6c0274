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
from curves import Curve, draw_curves, label_budgets, label_ends
from plot_serving import STYLE

from ems_vllm.eval.report.style import Style

# Of other engines, the best that reads a prompt once and the one that is ahead of EMS.
OURS = {
    "ems": ("EMS", Style(1, "o", "solid", True)),
    "ems, profile by head": ("EMS, by head", Style(1, "o", "dashed", False)),
    "snapkv": ("SnapKV", Style(2, "s", "solid", False)),
    "h2o": ("H2O", Style(3, "^", "solid", False)),
}
PEERS = {
    "compactor": ("Compactor", Style(4, "D", "dashed", False)),
    "kvzip": ("KVzip, reads twice", Style(5, "v", "dashed", False)),
}
PANELS = {
    "last": "question at the end of the prompt",
    "later": "question after compression",
    "continuation": "running text",
}
# Left of the first budget, for labels.
_ROOM = 5.5


def draw(results: Sequence[dict[str, Any]], peers: dict[str, Any]) -> plt.Figure:
    """Loss above the full cache's, one panel for each way to ask, one curve for each method.

    Args:
        results: On the same prompts; budgets are the first one's.
        peers: Losses by method, budget and prompt.
    """
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.5, 3.6), layout="constrained")
    budgets = [float(budget) for budget in results[0]["budgets"]]
    drawn = []
    for axes, (group, title) in zip(panels, PANELS.items(), strict=True):
        curves = [
            Curve(label, style, at, [found[budget] for budget in at])
            for label, style, found in _by_method(results, peers, group)
            if (at := [budget for budget in budgets if budget in found])
        ]
        axes.axhline(0, color="black", linestyle=":", linewidth=1)
        draw_curves(axes, curves)
        label_budgets(axes, budgets)
        axes.set_xlim(budgets[0] / _ROOM, budgets[-1] * 1.1)
        axes.set_xlabel("entries kept")
        axes.set_title(title, fontsize=9)
        drawn.append(curves)
    panels[0].set_ylabel("nats per token above the full cache")
    for axes, curves in zip(panels, drawn, strict=True):
        label_ends(axes, curves, "left")
    return figure


def _by_method(
    results: Sequence[dict[str, Any]], peers: dict[str, Any], group: str
) -> list[tuple[str, Style, dict[float, float]]]:
    """Label, style and loss by budget."""
    summaries = [summary for result in results for summary in result["summaries"]]
    found = []
    for variant, (label, style) in OURS.items():
        of_variant = {
            float(summary["budget"]): summary["loss_above_full"]
            for summary in summaries
            if summary["variant"] == variant and summary["group"] == group
        }
        found.append((label, style, of_variant))
    for press, (label, style) in PEERS.items():
        # Such as compactor-0.25.
        of_press = {
            float(name.rpartition("-")[2]): mean(losses[group].values())
            for name, losses in peers.items()
            if name.rpartition("-")[0] == press and group in losses
        }
        found.append((label, style, of_press))
    return found


def main(
    results: Annotated[list[Path], typer.Argument(help="Of the lab, on the same prompts.")],
    out: Annotated[Path, typer.Option(help="SVG or PNG file.")],
    peers: Annotated[Path | None, typer.Option(help="Losses of peers on the same prompts.")] = None,
) -> None:
    """Draw what is lost by budget."""
    read = [json.loads(result.read_text(encoding="utf-8")) for result in results]
    losses = {} if peers is None else json.loads(peers.read_text(encoding="utf-8"))["losses"]
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names within the file depend on the style's salt, also while it is written.
    with plt.rc_context(STYLE):
        figure = draw(read, losses)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
