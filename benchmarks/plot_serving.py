# SPDX-License-Identifier: Apache-2.0
"""Draws a report of bench_serving.py: blocks in use over time, and tokens per second.

Usage: python benchmarks/plot_serving.py REPORT.json docs/figures/serving.svg
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "svg.hashsalt": "ems",
    # Text, not its outlines: half the size, and words can be found.
    "svg.fonttype": "none",
}


def draw(report: dict[str, Any]) -> plt.Figure:
    """One row per case: the pool on the left, throughput on the right."""
    runs = report["runs"]
    cases = list(dict.fromkeys(run["case"] for run in runs))
    recipes = list(dict.fromkeys(run["recipe"] for run in runs))
    colors = {recipe: COLORS[i % len(COLORS)] for i, recipe in enumerate(recipes)}
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(9, 2.9 * len(cases) + 0.7),
        width_ratios=(2, 1),
        squeeze=False,
        layout="constrained",
    )
    for (left, right), case in zip(axes, cases, strict=True):
        of_case = [run for run in runs if run["case"] == case]
        _draw_pool(left, of_case, colors)
        _draw_throughput(right, of_case, colors)
        left.set_title(f"{case}: a pool of {of_case[0]['num_blocks']} blocks", loc="left")
    axes[0][1].set_title("output tokens per second", loc="left")
    axes[-1][0].set_xlabel("seconds since the requests were sent")
    axes[0][0].legend(loc="center")
    settings, environment = report["settings"], report["environment"]
    figure.suptitle(
        f"{settings['num_prompts']} requests of {settings['prompt_len']} + "
        f"{settings['num_new_tokens']} tokens, budget {settings['budget']}, "
        f"{Path(settings['model']).name} on {environment['gpu'] or environment['cpu']}",
        fontsize=10,
    )
    return figure


def _draw_pool(axes: Axes, runs: list[dict[str, Any]], colors: dict[str, str]) -> None:
    for run in runs:
        timeline = run["timeline"]
        axes.plot(
            [*timeline["time_s"], run["wall_s"]],
            [*timeline["used_blocks"], 0],
            color=colors[run["recipe"]],
            label=run["recipe"],
            drawstyle="steps-post",
        )
    num_blocks = runs[0]["num_blocks"]
    axes.axhline(num_blocks, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.05 * num_blocks)
    axes.set_xlim(left=0)
    axes.set_ylabel("blocks in use")


def _draw_throughput(axes: Axes, runs: list[dict[str, Any]], colors: dict[str, str]) -> None:
    recipes = [run["recipe"] for run in runs]
    values = [run["output_tokens_per_s"] for run in runs]
    bars = axes.bar(recipes, values, color=[colors[recipe] for recipe in recipes], width=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_ylim(0, 1.15 * max(values))
    axes.grid(axis="x", visible=False)


def main(
    report: Annotated[Path, typer.Argument(help="JSON of bench_serving.py.")],
    figure: Annotated[Path, typer.Argument(help="Output; its suffix chooses the format.")],
) -> None:
    """Draw the figure of a report."""
    with plt.rc_context(STYLE):
        drawn = draw(json.loads(report.read_text()))
        figure.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if figure.suffix == ".svg" else None
        drawn.savefig(figure, dpi=120, metadata=metadata)


if __name__ == "__main__":
    typer.run(main)
