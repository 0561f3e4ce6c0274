# SPDX-License-Identifier: Apache-2.0
"""From results of several runs to series: one method of one engine over its budgets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ems_vllm.eval.questions.protocol import LAST, ordered
from ems_vllm.eval.records.results import EvalResult, MethodResult, SampleResult, Serving
from ems_vllm.eval.report.stats import Array

# A task on which the full cache scores less tells nothing about compression.
MIN_FULL_SCORE = 0.5
# Peers round budgets differently; fractions this close share a column.
SAME_BUDGET = 1.05
FOCUS = "ems"

# Length, seed and index: with the task they determine the prompt.
Prompt = tuple[int, int, int]


@dataclass
class Point:
    """One method at one budget.

    Attributes:
        scores: By task and prompt. Where there is no answer it is 0, as the schema says; in tasks
            where less is better the prompt is left out, since 0 would be the best of all.
        samples: Every answer, errors too.
    """

    budget: int | None = None
    fraction: float | None = None
    scores: dict[str, dict[Prompt, float]] = field(default_factory=lambda: defaultdict(dict))
    samples: dict[tuple[str, Prompt], SampleResult] = field(default_factory=dict)
    serving: Serving = field(default_factory=Serving)

    @property
    def num_errors(self) -> int:
        return sum(sample.error is not None for sample in self.samples.values())


@dataclass
class Series:
    """One way of keeping the cache, in one engine and run.

    Attributes:
        detail: Engine, and what else tells it from others of the same name.
        run: Index of the run.
        points: By column of the report, ascending; under None for the full cache.
    """

    method: str
    engine: str
    detail: str
    run: int
    is_full: bool
    points: dict[float | None, Point]

    @property
    def label(self) -> str:
        return f"{self.method} ({self.detail})"

    @property
    def family(self) -> str:
        """What peers call alike: `SnapKVPress` is `snapkv`."""
        return "full" if self.is_full else self.method.lower().removesuffix("press")

    @property
    def in_focus(self) -> bool:
        return not self.is_full and self.family == FOCUS


@dataclass(frozen=True)
class Task:
    """A task over all runs.

    Attributes:
        full_score: Mean score of the full cache, the lowest if several ran it.
        excluded: Why it does not count in means; None if it does.
    """

    name: str
    higher_is_better: bool
    num_prompts: int
    has_depth: bool
    full_score: float | None
    excluded: str | None


@dataclass(frozen=True)
class Run:
    name: str
    model: str
    preset: str | None
    created: str
    environment: dict[str, Any]

    @property
    def model_name(self) -> str:
        """Without the folder, which differs between machines."""
        return Path(self.model).name

    @property
    def title(self) -> str:
        """As a heading: a name of the Hub in full, a path on one machine without its folders."""
        name = self.model_name if Path(self.model).is_absolute() else self.model
        return name or "unnamed model"


@dataclass
class Report:
    """Everything the pages draw on, of one protocol.

    Attributes:
        protocol: Where questions stand.
        columns: Budgets as fractions of the context, ascending.
        series: Full caches first, then those in focus, then the others as they came.
        skipped: What could not be placed, in words.
    """

    protocol: str
    runs: list[Run]
    tasks: list[Task]
    columns: list[float]
    series: list[Series]
    skipped: list[str]

    @property
    def compared(self) -> list[Task]:
        """Tasks that count in means."""
        return [task for task in self.tasks if task.excluded is None]

    @property
    def fulls(self) -> list[Series]:
        return [series for series in self.series if series.is_full]

    @property
    def compressed(self) -> list[Series]:
        return [series for series in self.series if not series.is_full]

    def reference(self, series: Series) -> Point | None:
        """The same model's full cache to measure against: the same engine's and run's if it can be.

        Engines differ in arithmetic and peers in versions, which is not a method's fault.
        """

        own = self.runs[series.run].model_name

        def closeness(full: Series) -> tuple[bool, bool]:
            return full.engine == series.engine, full.run == series.run

        # Another engine's answers may come without the model's name.
        fulls = [
            f for f in self.fulls if own in ("", name := self.runs[f.run].model_name) or not name
        ]
        return max(fulls, key=closeness).points[None] if fulls else None


def protocols(results: Sequence[EvalResult]) -> list[str]:
    """Protocols that were asked in, in their usual order; "last" where nothing was asked."""
    found = {s.protocol for result in results for m in result.methods for s in m.samples}
    return ordered(sorted(found)) or [LAST]


def aggregate(results: Sequence[EvalResult], protocol: str = LAST) -> Report:
    """Order the results of one or more runs for comparison.

    Protocols rank methods differently and have reports of their own; methods that were asked in
    others only are left out.
    """
    results = [_asked_in(protocol, result) for result in results]
    higher = {task: up for result in results for task, up in result.higher_is_better.items()}
    runs = [
        Run(name, result.model, result.preset, result.created, result.environment)
        for name, result in zip(_run_names(results), results, strict=True)
    ]
    skipped: list[str] = []
    series: list[Series] = []
    for index, result in enumerate(results):
        series += _series_of_run(index, result, higher, skipped)
    series = _join(series, runs)
    _add_run_names(series, runs)
    columns = _place_in_columns(series)
    series.sort(key=lambda each: (not each.is_full, not each.in_focus))
    return Report(protocol, runs, _tasks(series, higher), columns, series, skipped)


def _asked_in(protocol: str, result: EvalResult) -> EvalResult:
    methods = []
    for method in result.methods:
        samples = [sample for sample in method.samples if sample.protocol == protocol]
        if samples or not method.samples:
            methods.append(method.model_copy(update={"samples": samples}))
    return result.model_copy(update={"methods": methods})


def paired(task: str, points: Sequence[Point]) -> Array:
    """Scores [prompts, points] on the prompts of a task that all of them answered."""
    common = set.intersection(*(set(point.scores.get(task, ())) for point in points))
    rows = [[point.scores[task][prompt] for point in points] for prompt in sorted(common)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(points))


def _run_names(results: Sequence[EvalResult]) -> list[str]:
    """The first property that tells all runs apart, or a number."""
    properties: tuple[Callable[[EvalResult], Any], ...] = (
        lambda result: str(result.environment.get("commit") or "")[:9],
        lambda result: Path(result.model).name,
        lambda result: result.preset,
        lambda result: result.created,
    )
    for get in properties:
        names = [get(result) for result in results]
        if all(names) and len(set(names)) == len(names):
            return names
    return [f"run {i + 1}" for i in range(len(results))]


def _series_of_run(
    run: int, result: EvalResult, higher: dict[str, bool], skipped: list[str]
) -> list[Series]:
    groups: dict[tuple[str, str, bool], list[MethodResult]] = defaultdict(list)
    for method in result.methods:
        groups[method.method, method.engine, method.is_full].append(method)
    found: dict[tuple[str, str, bool, str], Series] = {}
    for (name, engine, is_full), members in groups.items():
        for method, variant in zip(members, _variants(members), strict=True):
            fraction = _fraction(method)
            if not is_full and fraction is None:
                skipped.append(f"{name} ({engine}): budget {method.budget}, no context length")
                continue
            detail = f"{engine}, {variant}" if variant else engine
            series = found.setdefault(
                (name, engine, is_full, variant), Series(name, engine, detail, run, is_full, {})
            )
            _add(series.points.setdefault(fraction, Point()), method, fraction, higher)
    return list(found.values())


def _variants(members: Sequence[MethodResult]) -> list[str]:
    """The settings in which entries of the same budget differ, such as an ablation's."""
    by_budget: dict[Any, list[MethodResult]] = defaultdict(list)
    for method in members:
        by_budget[method.budget, method.budget_fraction].append(method)
    differing = {
        key
        for group in by_budget.values()
        for key in {key for method in group for key in method.settings}
        if len({repr(method.settings.get(key)) for method in group}) > 1
    }
    return [
        ", ".join(f"{key}={method.settings.get(key)}" for key in sorted(differing))
        for method in members
    ]


def _fraction(method: MethodResult) -> float | None:
    if method.budget_fraction is not None or method.budget is None:
        return method.budget_fraction
    length = max((sample.length for sample in method.samples), default=0)
    return method.budget / length if length > 0 else None


def _add(
    point: Point, method: MethodResult, fraction: float | None, higher: dict[str, bool]
) -> None:
    point.budget, point.fraction = method.budget, fraction
    if point.serving == Serving():
        point.serving = method.serving
    for sample in method.samples:
        prompt = (sample.length, sample.seed, sample.index)
        point.samples[sample.task, prompt] = sample
        answered = sample.error is None and math.isfinite(sample.score)
        if answered:
            point.scores[sample.task][prompt] = sample.score
        elif higher.get(sample.task, True):
            point.scores[sample.task][prompt] = 0.0


def _join(series: Sequence[Series], runs: Sequence[Run]) -> list[Series]:
    """Join what several files hold of one method: other budgets, tasks or seeds, never the same.

    Peers write a file for each method and budget.
    """
    joined: dict[tuple[str, str, bool, str], list[Series]] = defaultdict(list)
    for each in series:
        same = joined[each.method, each.detail, each.is_full, runs[each.run].model_name]
        fitting = next((other for other in same if _disjoint(other, each)), None)
        if fitting is None:
            same.append(each)
            continue
        for fraction, point in each.points.items():
            whole = fitting.points.setdefault(fraction, point)
            if whole is not point:
                whole.samples |= point.samples
                for task, scores in point.scores.items():
                    whole.scores[task] |= scores
    kept = {id(each) for same in joined.values() for each in same}
    return [each for each in series if id(each) in kept]


def _disjoint(one: Series, other: Series) -> bool:
    return all(
        one.points[fraction].samples.keys().isdisjoint(other.points[fraction].samples)
        for fraction in one.points.keys() & other.points.keys()
    )


def _add_run_names(series: Sequence[Series], runs: Sequence[Run]) -> None:
    where: dict[tuple[str, str, bool], set[int]] = defaultdict(set)
    for each in series:
        where[each.method, each.detail, each.is_full].add(each.run)
    ambiguous = [len(where[each.method, each.detail, each.is_full]) > 1 for each in series]
    for each, needed in zip(series, ambiguous, strict=True):
        if needed:
            each.detail += f", {runs[each.run].name}"


def _place_in_columns(series: Iterable[Series]) -> list[float]:
    """Key every series' points by shared columns, which are returned."""
    compressed = [each for each in series if not each.is_full]
    fractions = sorted({f for each in compressed for f in each.points if f is not None})
    column_of: dict[float, float] = {}
    for tolerance in (SAME_BUDGET, 1.0):
        start = 0.0
        for fraction in fractions:
            if not column_of or fraction > start * tolerance:
                start = fraction
            column_of[fraction] = start
        # A series with two budgets in one column means that they are not the same.
        if all(len({column_of[f] for f in s.points if f}) == len(s.points) for s in compressed):
            break
    for each in compressed:
        each.points = {column_of[f]: each.points[f] for f in sorted(f for f in each.points if f)}
    return sorted(set(column_of.values()))


def _tasks(series: Sequence[Series], higher: dict[str, bool]) -> list[Task]:
    prompts: dict[str, set[Prompt]] = defaultdict(set)
    with_depth = set()
    for each in series:
        for point in each.points.values():
            for (task, prompt), sample in point.samples.items():
                prompts[task].add(prompt)
                if sample.depth is not None:
                    with_depth.add(task)
    fulls = [each.points[None] for each in series if each.is_full]
    return [
        _task(name, higher.get(name, True), len(prompts[name]), name in with_depth, fulls)
        for name in sorted(prompts, key=lambda name: (not higher.get(name, True), name))
    ]


def _task(name: str, up: bool, num_prompts: int, has_depth: bool, fulls: list[Point]) -> Task:
    means = [float(paired(name, [full]).mean()) for full in fulls if full.scores.get(name)]
    worst = min if up else max
    full_score = worst(means, default=None)
    excluded = None
    if not up:
        excluded = "less is better"
    elif fulls and full_score is None:
        excluded = "the full cache did not run it"
    elif full_score is not None and full_score < MIN_FULL_SCORE:
        excluded = f"the full cache itself scores {full_score:.2f}"
    return Task(name, up, num_prompts, has_depth, full_score, excluded)
