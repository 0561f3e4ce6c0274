# SPDX-License-Identifier: Apache-2.0
"""From results of several runs to the facts that a report is made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ems_vllm.eval.questions.protocol import LAST, ordered
from ems_vllm.eval.records.results import EvalResult, MethodResult, Serving
from ems_vllm.eval.report.facts import (
    MIN_FULL_SCORE,
    Point,
    Prompt,
    Report,
    RunFacts,
    Series,
    TaskFacts,
    paired,
)

# Peers round budgets differently; fractions this close share a column.
SAME_BUDGET = 1.05


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
        RunFacts(name, result.model, result.preset, result.created, result.environment)
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


def _join(series: Sequence[Series], runs: Sequence[RunFacts]) -> list[Series]:
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


def _add_run_names(series: Sequence[Series], runs: Sequence[RunFacts]) -> None:
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


def _tasks(series: Sequence[Series], higher: dict[str, bool]) -> list[TaskFacts]:
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


def _task(name: str, up: bool, num_prompts: int, has_depth: bool, fulls: list[Point]) -> TaskFacts:
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
    return TaskFacts(name, up, num_prompts, has_depth, full_score, excluded)
