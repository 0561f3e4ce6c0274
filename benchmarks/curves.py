# SPDX-License-Identifier: Apache-2.0
"""Curves of a figure that stands alone: in the report's colours, each labelled at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ems_vllm.eval.report.style import PALETTE, Style

# More cannot be told apart at a glance.
MOST_CURVES = 6
_FONT_SIZE = 8
# Points between the lower edges of two labels, and from a curve's end to its label.
_LINE_HEIGHT = 1.25 * _FONT_SIZE
_DISTANCE = 6


@dataclass(frozen=True)
class Curve:
    """One method over its budgets.

    Attributes:
        x, y: Points, x ascending.
        low, high: Bounds of the band; empty for none.
    """

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw curves, those that are emphasised on top.

    Raises:
        ValueError: there are more than can be told apart.
    """
    if len(curves) > MOST_CURVES:
        raise ValueError(f"{len(curves)} curves: choose at most {MOST_CURVES}")
    for curve in sorted(curves, key=lambda curve: curve.style.emphasised):
        color, strong = PALETTE[curve.style.color][0], curve.style.emphasised
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        axes.plot(
            curve.x,
            curve.y,
            color=color,
            linestyle=curve.style.line,
            linewidth=2.6 if strong else 1.4,
            marker=curve.style.marker,
            markersize=5.5 if strong else 4,
            markeredgewidth=0,
        )


def label_budgets(axes: Axes, budgets: Sequence[float]) -> None:
    """A logarithmic axis of fractions of the prompt, with a tick at each."""
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{100 * budget:.3g} %" for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", visible=False)


def label_ends(axes: Axes, curves: Sequence[Curve], side: Literal["left", "right"]) -> None:
    """Write each label beside its curve's end, moved up or down where two would overlap.

    All stand where the longest curve ends. The x axis must have room on that side; its limits and
    those of y must be final.
    """
    axes.figure.draw_without_rendering()
    to_points = 72 / axes.figure.dpi
    end = 0 if side == "left" else -1
    curves = [curve for curve in curves if curve.x]
    furthest = min if side == "left" else max
    x = furthest(curve.x[end] for curve in curves)
    places = [axes.transData.transform((curve.x[end], curve.y[end])) for curve in curves]
    heights = spread([float(y) * to_points for _, y in places], _LINE_HEIGHT)
    for curve, (_, y), height in zip(curves, places, heights, strict=True):
        axes.annotate(
            curve.label,
            (x, curve.y[end]),
            (-_DISTANCE if side == "left" else _DISTANCE, height - float(y) * to_points),
            textcoords="offset points",
            ha="right" if side == "left" else "left",
            va="center",
            size=_FONT_SIZE,
            color=PALETTE[curve.style.color][0],
            fontweight="bold" if curve.style.emphasised else "normal",
        ).set_in_layout(False)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the same order, as near to the given ones as they get.

    Args:
        heights: Where labels would stand.
        gap: > 0.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    # Labels that touch form a stack, which is centred where its labels would be on the mean.
    stacks: list[list[int]] = []
    for index in order:
        stacks.append([index])
        while len(stacks) > 1 and _low(stacks[-1], heights, gap) < (
            _low(stacks[-2], heights, gap) + gap * len(stacks[-2])
        ):
            top = stacks.pop()
            stacks[-1] += top
    found = [0.0] * len(heights)
    for stack in stacks:
        for place, index in enumerate(stack):
            found[index] = _low(stack, heights, gap) + gap * place
    return found


def _low(stack: Sequence[int], heights: Sequence[float], gap: float) -> float:
    """Height of a stack's lowest label."""
    return sum(heights[index] for index in stack) / len(stack) - gap * (len(stack) - 1) / 2
