# SPDX-License-Identifier: Apache-2.0
"""Which figures a report has, and what they show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ems_vllm.eval.report.compare import Table, relative_scores
from ems_vllm.eval.report.facts import Point, Report, Series
from ems_vllm.eval.report.figures import HALF, NARROW, WIDE, Line, Scale, chart
from ems_vllm.eval.report.style import Style
from ems_vllm.eval.report.wording import count

_BUDGET = "budget (% of the context, log scale)"
_RELATIVE = "score (% of the full cache's)"
_ABSOLUTE = "score"
_MAX_TICKS = 9


@dataclass(frozen=True)
class Panel:
    """A figure with its title.

    Attributes:
        svg: Empty where there is nothing to draw.
        wide: The same for a wide window; empty if one form does for both.
        excluded: Drawn greyed.
    """

    title: str
    caption: str
    svg: str
    wide: str = ""
    excluded: bool = False


@dataclass(frozen=True)
class Shown:
    """The series in figures, each with its style."""

    series: Sequence[Series]
    styles: Sequence[Style]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(zip(self.series, self.styles, strict=True))


def mean_panel(report: Report, mean: Table, shown: Shown) -> Panel:
    """Quality against budget, mean over the tasks compared."""
    lines = _curves(mean, shown, mean.relative)
    scale = Scale(
        _BUDGET,
        _RELATIVE if mean.relative else _ABSOLUTE,
        _ticks(report.columns),
        baseline=100 if mean.relative else None,
    )
    caption = f"{count(len(report.compared), 'task')}, each counting the same"
    if not lines:
        return Panel("Mean over tasks", caption, "")
    svg, wide = chart(lines, scale, NARROW), chart(lines, scale, WIDE)
    return Panel("Mean over tasks", caption, svg, wide)


def task_panels(report: Report, tables: Sequence[Table], shown: Shown) -> list[Panel]:
    """Quality against budget for every task; where the full cache fails, absolute scores."""
    return [_task_panel(report, table, shown) for table in tables]


def memory_panel(report: Report, mean: Table, shown: Shown) -> Panel:
    """Quality against the KV cache that a request holds."""
    return _serving_panel(
        mean,
        shown,
        "Memory",
        "KV cache per request once its prompt is processed",
        "KV cache per request (MiB, log scale)",
        lambda point: _scaled(point.serving.kv_bytes_per_request, 1 / 2**20),
        log_x=True,
    )


def speed_panels(report: Report, mean: Table, shown: Shown) -> list[Panel]:
    """Quality against throughput and latencies."""
    panels = [
        _serving_panel(
            mean,
            shown,
            "Throughput",
            "more is better: up and to the right",
            "output tokens per second",
            lambda point: point.serving.output_tokens_per_s,
        ),
        _serving_panel(
            mean,
            shown,
            "Time to first token",
            "less is better: up and to the left",
            "TTFT, median (ms)",
            lambda point: _scaled(point.serving.ttft_s, 1000),
        ),
        _serving_panel(
            mean,
            shown,
            "Time per output token",
            "less is better: up and to the left",
            "TPOT, median (ms)",
            lambda point: _scaled(point.serving.tpot_s, 1000),
        ),
    ]
    return [panel for panel in panels if panel.svg]


def _task_panel(report: Report, table: Table, shown: Shown) -> Panel:
    task = table.task
    assert task is not None
    relative = bool(report.fulls) and task.excluded is None
    facts = [count(task.num_prompts, "prompt")]
    if task.full_score is not None:
        facts.append(f"full cache {task.full_score:.3f}")
    if not task.higher_is_better:
        y_label = f"bits per byte{' above the full cache' if table.is_difference else ''}"
        baseline = 0 if table.is_difference else None
        scale = Scale(_BUDGET, y_label, _ticks(report.columns), baseline=baseline, y_floor=None)
        facts.append("less is better")
    elif relative:
        scale = Scale(_BUDGET, _RELATIVE, _ticks(report.columns), baseline=100)
    else:
        scale = Scale(_BUDGET, _ABSOLUTE, _ticks(report.columns), baseline=task.full_score)
    lines = _curves(relative_scores(report, task) if relative else table, shown, relative)
    failed = task.excluded is not None and task.higher_is_better
    return Panel(task.name, ", ".join(facts), chart(lines, scale) if lines else "", excluded=failed)


def _curves(table: Table, shown: Shown, relative: bool) -> list[Line]:
    lines = []
    for series, style in shown:
        if series.is_full:
            continue
        factor = 100 if relative else 1
        # A logarithmic axis has no place for an empty cache.
        points = [
            (100 * column, cell.interval)
            for column in series.points
            if column and (cell := table.cell(series, column)) is not None
        ]
        if points:
            lines.append(
                Line(
                    style,
                    [x for x, _ in points],
                    [factor * interval.value for _, interval in points],
                    [factor * interval.low for _, interval in points],
                    [factor * interval.high for _, interval in points],
                )
            )
    return lines


def _serving_panel(
    mean: Table,
    shown: Shown,
    title: str,
    caption: str,
    x_label: str,
    measure: Callable[[Point], float | None],
    log_x: bool = False,
) -> Panel:
    lines = []
    compressed = False
    for series, style in shown:
        points = []
        for column, point in series.points.items():
            x, cell = measure(point), mean.cell(series, column)
            if x is None or cell is None or (log_x and x <= 0):
                continue
            y = 1.0 if series.is_full and mean.relative else cell.interval.value
            label = "full" if column is None else f"{100 * column:.3g} %"
            points.append((x, y * (100 if mean.relative else 1), label))
        if points:
            compressed |= not series.is_full
            labels = [label for *_, label in points] if style.emphasised or series.is_full else []
            lines.append(
                Line(style, [x for x, *_ in points], [y for _, y, _ in points], labels=labels)
            )
    y_label = _RELATIVE if mean.relative else _ABSOLUTE
    if not compressed:
        return Panel(title, caption, "")
    baseline = 100 if mean.relative else None
    scale = Scale(x_label, y_label, log_x=log_x, baseline=baseline, headroom=0.1)
    return Panel(title, caption, chart(lines, scale), chart(lines, scale, HALF))


def _ticks(columns: Sequence[float]) -> dict[float, str]:
    """As many budgets as can be labelled side by side."""
    positive = [column for column in columns if column > 0]
    found: dict[float, str] = {}
    if not positive:
        return found
    gap = math.log(positive[-1] / positive[0]) / _MAX_TICKS
    last = -math.inf
    for column in positive:
        if math.log(column) - last >= gap:
            found[100 * column] = f"{100 * column:.3g}"
            last = math.log(column)
    return found


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
