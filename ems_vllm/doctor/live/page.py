# SPDX-License-Identifier: Apache-2.0
"""A page of `/metrics`, asked for by name: engines are added up, or told apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_ENGINE = "engine"


@dataclass(frozen=True)
class Page:
    """Samples by name, each with its labels.

    Attributes:
        samples: As Prometheus names them: counters end in `_total`.
    """

    samples: Mapping[str, list[tuple[Mapping[str, str], float]]]

    @classmethod
    def parse(cls, text: str) -> Page:
        """From the text that a server answers.

        Raises:
            ValueError: it is not in Prometheus' format.
        """
        samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name].append((sample.labels, float(sample.value)))
        return cls(dict(samples))

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.samples)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all engines and over labels that are not named; None where there is none."""
        found = [
            value
            for own, value in self.samples.get(name, ())
            if labels.items() <= own.items() and math.isfinite(value)
        ]
        return sum(found) if found else None

    def by_engine(self, name: str, **labels: str) -> dict[str, float]:
        """As `total`, for each engine of a data-parallel server."""
        sums: dict[str, float] = defaultdict(float)
        for own, value in self.samples.get(name, ()):
            if labels.items() <= own.items():
                sums[own.get(_ENGINE, "")] += value
        return dict(sums)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """As `total`, by the values of a label."""
        sums: dict[str, float] = defaultdict(float)
        for own, value in self.samples.get(name, ()):
            sums[own.get(label, "")] += value
        return dict(sums)

    def info(self, name: str) -> list[Mapping[str, str]]:
        """Labels of a metric that says everything in them, one for each engine."""
        return [labels for labels, _ in self.samples.get(name, ())]

    def buckets(self, name: str) -> dict[float, float]:
        """Observations of a histogram up to each bound, all engines together."""
        sums: dict[float, float] = defaultdict(float)
        for labels, value in self.samples.get(f"{name}_bucket", ()):
            sums[float(labels["le"])] += value
        return dict(sorted(sums.items()))
