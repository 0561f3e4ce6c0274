# SPDX-License-Identifier: Apache-2.0
"""Single answers worth reading: what compression broke, and what failed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.eval.records.results import SampleResult
from ems_vllm.eval.report.facts import Report, Series

MAX_WORST = 40
MAX_PER_SERIES = 4
MAX_ERRORS = 20


@dataclass(frozen=True)
class Worst:
    """An answer that the full cache gave better.

    Attributes:
        column: Budget.
        full: The full cache's answer to the same prompt; None without one.
    """

    series: Series
    column: float
    sample: SampleResult
    full: SampleResult | None
    drop: float


@dataclass(frozen=True)
class Failure:
    label: str
    columns: list[float | None]
    message: str
    count: int


def worst_samples(report: Report, shown: Sequence[Series]) -> list[Worst]:
    """The largest losses, at the largest budgets first: there they are least to be expected.

    A prompt is shown once per method. Answers to tasks that the full cache fails tell nothing.
    """
    compared = {task.name for task in report.compared}
    found: list[Worst] = []
    for series in shown:
        if series.is_full:
            continue
        baseline = report.baseline(series)
        losses = []
        for column, point in series.points.items():
            for key, sample in point.samples.items():
                full = baseline.samples.get(key) if baseline else None
                missing = sample.error is not None or (baseline is not None and full is None)
                if column is None or missing or sample.task not in compared:
                    continue
                # Without a full cache, what is lost is what lacks to a perfect score.
                drop = (full.score if full else 1.0) - sample.score
                if drop > 0:
                    losses.append(Worst(series, column, sample, full, drop))
        losses.sort(key=lambda worst: (-worst.drop, -worst.column, *_place(worst.sample)))
        first = {_place(worst.sample): worst for worst in reversed(losses)}
        found += [worst for worst in losses if first[_place(worst.sample)] is worst][
            :MAX_PER_SERIES
        ]
    return found[:MAX_WORST]


def failures(report: Report) -> list[Failure]:
    """Error messages by method, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    columns: dict[tuple[str, str], dict[float | None, None]] = defaultdict(dict)
    for series in report.series:
        for column, point in series.points.items():
            for sample in point.samples.values():
                if sample.error is not None:
                    key = (series.label, sample.error)
                    counts[key] += 1
                    columns[key][column] = None
    return [
        Failure(key[0], list(columns[key]), key[1], count)
        for key, count in counts.most_common(MAX_ERRORS)
    ]


def _place(sample: SampleResult) -> tuple[str, int, int, int]:
    return sample.task, sample.length, sample.seed, sample.index
