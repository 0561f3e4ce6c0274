# SPDX-License-Identifier: Apache-2.0
"""By budget: memory of a request, requests at a time, and how far answers are from dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ems_vllm.advise.report import AdviceReport
from ems_vllm.advise.rows import DENSE
from ems_vllm.eval.report.style import PALETTE

_GREY, _OURS, _OTHER = (PALETTE[index][0] for index in (0, 1, 2))
_RC: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "svg.fonttype": "none",
    "svg.hashsalt": "ems",
}
# On a logarithmic axis: what is below is drawn there.
_LEAST_KL = 1e-4
_KL_TICKS = {_LEAST_KL: "less", 0.001: "0.001", 0.01: "0.01", 0.1: "0.1", 1.0: "1", 10.0: "10"}


def draw(report: AdviceReport, path: Path) -> None:
    """Write the figure.

    Args:
        report: What was found.
        path: An image file.
    """
    with matplotlib.rc_context(_RC):
        # No pyplot: it keeps global state and picks a backend.
        count = 3 if report.sample else 2
        figure = Figure(figsize=(6.4, 2.3 * count), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(count, 1, sharex=True)
        labels = [DENSE, *(budget.label for budget in report.budgets)]
        _memory(panels[0], report, labels)
        _at_a_time(panels[1], report, labels)
        if report.sample:
            _quality(panels[2], report, report.sample.max_kl)
        panels[-1].set_xticks(range(len(labels)), labels)
        panels[-1].set_xlabel("budget: entries kept, or a share of the prompt")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _colors(report: AdviceReport, labels: Sequence[str]) -> list[str]:
    """Of bars: grey for dense, and one of its own for what is suggested."""
    chosen = report.suggestion.budget
    return [_GREY if label == DENSE else _OURS if label == chosen else _OTHER for label in labels]


def _memory(axes: Axes, report: AdviceReport, labels: Sequence[str]) -> None:
    found = [report.dense, *(budget.by_length for budget in report.budgets)]
    mib = [one.mib_mean for one in found]
    axes.bar(range(len(labels)), mib, color=_colors(report, labels), width=0.6)
    of_a_block = report.dense.mib_mean / report.dense.blocks_mean
    p95 = [one.blocks_p95 * of_a_block for one in found]
    axes.plot(range(len(labels)), p95, "_", color="black", markersize=18, label="p95")
    axes.set_ylabel("MiB of a request")
    axes.set_title("Held at most once the prompt is over: mean and p95 (by arithmetic)", size=9.5)
    axes.legend(frameon=False, loc="upper right")


def _at_a_time(axes: Axes, report: AdviceReport, labels: Sequence[str]) -> None:
    found = [report.dense, *(budget.by_length for budget in report.budgets)]
    if report.pool is None:
        heights = [report.dense.blocks_held / one.blocks_held for one in found]
        title, label = "Blocks of a running request, times fewer (by arithmetic)", "times"
        texts = [f"{height:.1f}" for height in heights]
    else:
        heights = [float(one.fit or 0) for one in found]
        title, label = f"Run at a time in {report.pool.gib:.4g} GiB (by arithmetic)", "requests"
        texts = [f"{height:,.0f}" for height in heights]
    bars = axes.bar(range(len(labels)), heights, color=_colors(report, labels), width=0.6)
    axes.bar_label(bars, texts, size=8)
    axes.margins(y=0.15)
    axes.set_ylabel(label)
    axes.set_title(title, size=9.5)


def _quality(axes: Axes, report: AdviceReport, max_kl: float) -> None:
    axes.set_yscale("log")
    for index, budget in enumerate(report.budgets, start=1):
        if budget.quality is not None:
            color = _OURS if budget.label == report.suggestion.budget else _OTHER
            kls = [max(kl, _LEAST_KL) for kl in budget.quality.kl]
            axes.plot([index] * len(kls), kls, "o", color=color, alpha=0.55, markeredgewidth=0)
            mean = max(budget.quality.kl_mean, _LEAST_KL)
            axes.plot(index, mean, "_", color="black", markersize=18)
    axes.axhline(max_kl, color=_GREY, linestyle=(0, (5, 3)))
    axes.annotate(
        f"{max_kl:g}", (0, max_kl), (0, 3), textcoords="offset points", color=_GREY, ha="center"
    )
    # Ticks would widen the axis.
    _, high = axes.get_ylim()
    axes.set_yticks(list(_KL_TICKS), list(_KL_TICKS.values()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0.6 * _LEAST_KL, max(high, 2 * max_kl))
    axes.set_ylabel("nats a token")
    axes.set_title("KL from dense: each prompt of the sample, and their mean (measured)", size=9.5)
