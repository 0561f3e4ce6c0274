# SPDX-License-Identifier: Apache-2.0
"""What a report knows: runs, tasks, and series of one method of one engine over its budgets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ems_vllm.eval.records.results import SampleResult, Serving
from ems_vllm.eval.report.stats import Array

# A task on which the full cache scores less tells nothing about compression.
MIN_FULL_SCORE = 0.5
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
class TaskFacts:
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
class RunFacts:
    """A run as its result describes it; the name tells it from the other runs of a report."""

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
    runs: list[RunFacts]
    tasks: list[TaskFacts]
    columns: list[float]
    series: list[Series]
    skipped: list[str]

    @property
    def compared(self) -> list[TaskFacts]:
        """Tasks that count in means."""
        return [task for task in self.tasks if task.excluded is None]

    @property
    def fulls(self) -> list[Series]:
        return [series for series in self.series if series.is_full]

    @property
    def compressed(self) -> list[Series]:
        return [series for series in self.series if not series.is_full]

    def baseline(self, series: Series) -> Point | None:
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


def paired(task: str, points: Sequence[Point]) -> Array:
    """Scores [prompts, points] on the prompts of a task that all of them answered."""
    common = set.intersection(*(set(point.scores.get(task, ())) for point in points))
    rows = [[point.scores[task][prompt] for point in points] for prompt in sorted(common)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(points))
