# SPDX-License-Identifier: Apache-2.0
"""Curves as inline SVG that takes its colours from the page's style sheet.

Figures hold numbers and axis labels only: titles and legends are the page's, so that they wrap on
a narrow window and never cover data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ems_vllm.eval.report.style import PALETTE, Style

# Stand-ins, replaced in the finished SVG by what follows the page's light or dark scheme.
_TEXT = "#010203"
_GRID = "#040506"
_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "text.color": _TEXT,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    # Text stays text: small files, the reader's font, and it can be selected.
    "svg.fonttype": "none",
    "svg.hashsalt": "ems",
}
NARROW = (4.3, 2.9)
WIDE = (9.6, 4.2)
HALF = (6.4, 3.4)
# Points that a label takes, across and up.
_LABEL = (28, 17)


@dataclass
class Line:
    """One series in one figure.

    Attributes:
        low, high: Bounds of the band; empty for none.
        labels: Written at the points; empty for none.
    """

    style: Style
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """The axes of a figure.

    Attributes:
        x_ticks: Where the x axis is labelled; None to choose.
        baseline: Height of the full cache's line.
        y_floor: The y axis reaches down to it at least.
        headroom: Room above the data, for labels, as a share of the axis.
    """

    x_label: str
    y_label: str
    x_ticks: dict[float, str] | None = None
    log_x: bool = True
    baseline: float | None = None
    y_floor: float | None = 0.0
    headroom: float = 0.0


def chart(lines: Sequence[Line], scale: Scale, size: tuple[float, float] = NARROW) -> str:
    """An <svg> element without a width: the page scales it."""
    with matplotlib.rc_context(_RC):
        # No pyplot: it keeps global state and picks a backend.
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        if scale.log_x:
            axes.set_xscale("log")
        if scale.baseline is not None:
            axes.axhline(scale.baseline, color=PALETTE[0][0], linestyle=(0, (5, 3)), linewidth=1.5)
        # What is emphasised is drawn last, on top.
        for line in sorted(lines, key=lambda line: line.style.emphasised):
            _draw(axes, line, min(0.1, 0.6 / len(lines)))
        _finish(axes, scale)
        for line in lines:
            _label(axes, line)
        return _svg(figure)


def _draw(axes: Axes, line: Line, band: float) -> None:
    strong = line.style.emphasised
    color = PALETTE[line.style.color][0]
    if line.low:
        axes.fill_between(
            line.x, line.low, line.high, color=color, alpha=0.22 if strong else band, linewidth=0
        )
    axes.plot(
        line.x,
        line.y,
        color=color,
        linestyle=line.style.line,
        linewidth=2.6 if strong else 1.4,
        marker=line.style.marker,
        markersize=5.5 if strong else 4,
        markeredgewidth=0,
        alpha=1 if strong else 0.9,
    )


def _label(axes: Axes, line: Line) -> None:
    """Write labels at their points, leaving out those that would cover one another."""
    pixels = axes.transData.transform(list(zip(line.x, line.y, strict=True)))
    places = [(float(x), float(y)) for x, y in pixels * 72 / axes.figure.dpi]
    taken: list[tuple[float, float]] = []
    for (across, up), x, y, label in zip(places, line.x, line.y, line.labels, strict=False):
        if any(abs(across - a) < _LABEL[0] and abs(up - u) < _LABEL[1] for a, u in taken):
            continue
        taken.append((across, up))
        # Above the point, unless the curve goes there: then to its left.
        rising = any(abs(across - a) < _LABEL[0] / 2 and 0 < u - up < _LABEL[0] for a, u in places)
        axes.annotate(
            label,
            (x, y),
            (-6, -3) if rising else (0, 6),
            textcoords="offset points",
            ha="right" if rising else "center",
            color=PALETTE[line.style.color][0],
            size=8,
        )


def _finish(axes: Axes, scale: Scale) -> None:
    axes.set_xlabel(scale.x_label)
    axes.set_ylabel(scale.y_label)
    axes.grid(axis="x", visible=False)
    if scale.log_x:
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    if scale.x_ticks is not None:
        axes.set_xticks(list(scale.x_ticks), list(scale.x_ticks.values()))
    elif scale.log_x:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = axes.get_ylim()
    if scale.y_floor is not None:
        low = min(scale.y_floor, low)
    axes.set_ylim(low, high + (scale.headroom * (high - low)))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # <metadata> names foreign hosts and the time, and <style> would hold for the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href=", "href=")
    for stand_in, name in ((_TEXT, "currentColor"), (_GRID, "var(--grid)")):
        text = text.replace(stand_in, name)
    for index, (color, _) in enumerate(PALETTE):
        text = text.replace(color, f"var(--c{index})")
    return text.strip()


def with_own_ids(svg: str, number: int) -> str:
    """The figure as the n-th of a page: markers and clips get names that no other figure has."""
    for before in ('id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}f{number}-")
    return svg
