# SPDX-License-Identifier: Apache-2.0
"""One HTML file with everything in it: no script, no font and no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from ems_vllm.eval.records.results import Serving
from ems_vllm.eval.report import heatmaps, panels, samples, wording
from ems_vllm.eval.report.compare import Table
from ems_vllm.eval.report.facts import MIN_FULL_SCORE, Report, Series
from ems_vllm.eval.report.figures import with_own_ids
from ems_vllm.eval.report.section import Section, comparison, side_by_side
from ems_vllm.eval.report.stats import RESAMPLES
from ems_vllm.eval.report.style import PALETTE, styles
from ems_vllm.eval.report.verdict import Tile, focus, headline_column, tiles, verdict

# More curves than this cannot be told apart; tables show every method.
MAX_SHOWN = 12


@dataclass(frozen=True)
class RunFacts:
    """What runs have in common, told once: peers write a file for every budget."""

    names: list[str]
    model: str
    preset: str | None
    created: str
    environment: dict[str, Any]


def html(parts: Sequence[Section]) -> str:
    """The page, a section for each protocol."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ems_vllm.eval.report"),
        # Answers and names are foreign text; only our own SVG is markup.
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(percent=wording.percent, count=wording.count, svg=_Embedder())
    environment.filters.update(
        printable=wording.printable,
        value=wording.value,
        bounds=wording.bounds,
        size=wording.size,
        duration=wording.duration,
    )
    several = len(parts) > 1
    bodies = [_section(environment, part, several) for part in parts]
    reports = [part.report for part in parts]
    series = [series for report in reports for series in report.series]
    points = [point for each in series for point in each.points.values()]
    return environment.get_template("report.html.j2").render(
        reports=reports,
        sections=list(zip(parts, bodies, strict=True)),
        several=several,
        models=list(dict.fromkeys(run.title for run in reports[0].runs)),
        presets=list(dict.fromkeys(run.preset for run in reports[0].runs)),
        runs=run_facts(reports[0]),
        methods=list(dict.fromkeys(s.method for s in series if not s.is_full)),
        has_full=any(s.is_full for s in series),
        columns=sorted({column for report in reports for column in report.columns}),
        max_columns=max(len(report.columns) for report in reports),
        tasks=list(dict.fromkeys(task.name for report in reports for task in report.tasks)),
        skipped=list(dict.fromkeys(line for report in reports for line in report.skipped)),
        verdicts=[(part, verdict(part.report, part.mean)) for part in parts],
        comparison=comparison(parts),
        tiles=_tiles(parts),
        across=side_by_side(parts),
        relative=parts[0].mean.relative,
        heat_colors=heatmaps.palette(),
        palette=PALETTE,
        num_errors=sum(point.num_errors for point in points),
        num_samples=sum(len(point.samples) for point in points),
        min_full_score=MIN_FULL_SCORE,
        resamples=RESAMPLES,
    )


def _section(environment: jinja2.Environment, part: Section, several: bool) -> Markup:
    """Figures and tables of one protocol."""
    report, mean = part.report, part.mean
    series = shown_series(report, mean)
    shown = panels.Shown(series, styles(series))
    ours = focus(report, mean)
    text = environment.get_template("section.html.j2").render(
        report=report,
        heading="h3" if several else "h2",
        subheading="h4" if several else "h3",
        focus=ours,
        headline=headline_column(report, mean, ours) if ours else None,
        entries=_entries(report),
        mean=mean,
        tables=part.tables,
        legend=list(shown),
        served=[(each, style) for each, style in shown if _has_figures(each)],
        num_hidden=len(report.series) - len(series),
        mean_panel=panels.mean_panel(report, mean, shown),
        task_panels=panels.task_panels(report, part.tables, shown),
        memory_panel=panels.memory_panel(report, mean, shown),
        speed_panels=panels.speed_panels(report, mean, shown),
        heat_tasks=heatmaps.heat_tasks(report, series),
        heat_colors=heatmaps.palette(),
        worst=samples.worst_samples(report, series),
        failures=samples.failures(report),
    )
    # Escaped by the template.
    return Markup(text)


def _tiles(parts: Sequence[Section]) -> list[Tile]:
    """All numbers of the first protocol, and the score of the others."""
    found = [tiles(part.report, part.mean) for part in parts]
    if len(parts) < 2:
        return found[0]
    shown = [found[0], *(each[:1] for each in found[1:])]
    return [
        Tile(tile.number, f"{part.title.lower()}: {tile.caption}")
        for part, each in zip(parts, shown, strict=True)
        for tile in each
    ]


def shown_series(report: Report, mean: Table) -> list[Series]:
    """The series that figures show: full caches, those in focus, and the best of the others."""

    def rank(series: Series) -> tuple[bool, float]:
        cells = [mean.cell(series, column) for column in series.points]
        values = [cell.interval.value for cell in cells if cell is not None]
        return not series.in_focus, -sum(values) / len(values) if values else 0.0

    chosen = {id(series) for series in sorted(report.compressed, key=rank)[:MAX_SHOWN]}
    chosen |= {id(series) for series in report.fulls[:MAX_SHOWN]}
    return [series for series in report.series if id(series) in chosen]


def run_facts(report: Report) -> list[RunFacts]:
    """Runs, those that differ only in their time together."""
    found: dict[str, RunFacts] = {}
    for run in report.runs:
        key = repr((run.model, run.preset, sorted(run.environment.items(), key=repr)))
        facts = RunFacts([], run.model, run.preset, run.created, run.environment)
        found.setdefault(key, facts).names.append(run.name)
    return list(found.values())


class _Embedder:
    """Puts figures into a page as markup, counting them."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, svg: str) -> Markup:
        self._number += 1
        return Markup(with_own_ids(svg, self._number))


def _entries(report: Report) -> dict[float, int]:
    """Budgets in entries, where all methods agree."""
    counts: dict[float, set[int | None]] = {column: set() for column in report.columns}
    for series in report.compressed:
        for column, point in series.points.items():
            if column is not None:
                counts[column].add(point.budget)
    return {c: only for c, found in counts.items() if len(found) == 1 for only in found if only}


def _has_figures(series: Series) -> bool:
    return any(point.serving != Serving() for point in series.points.values())
