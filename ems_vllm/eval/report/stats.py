# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals: Wilson's for 0/1 scores, a bootstrap for everything else.

All methods answer the same prompts, so that what differs between two of them is resampled in pairs:
the prompts' own difficulty, which is most of the variance, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

Array = NDArray[np.floating]
# From the means of every stratum and column, [..., strata, columns], to one number each, [...].
Statistic = Callable[[Array], Array]


@dataclass(frozen=True)
class Interval:
    """An estimate and where the true value lies with 95 % confidence.

    Attributes:
        low, high: NaN where too few samples say anything about the spread.
        n: Samples behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside; never for an interval that is not known."""
        return self.low > value or self.high < value


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not push the bounds past the estimate at 0 and 1.
    return Interval(
        share, max(0.0, min(center - half, share)), min(1, max(center + half, share)), n
    )


def mean_interval(scores: Array) -> Interval:
    """The mean of independent scores: Wilson's interval if all are 0 or 1, else a bootstrap."""
    if np.isin(scores, (0, 1)).all():
        return wilson(float(scores.sum()), len(scores))
    return bootstrap([scores[:, None]], macro_mean)


def bootstrap(strata: Sequence[Array], statistic: Statistic) -> Interval:
    """Percentile bootstrap of a statistic of stratum means (Efron 1979).

    Rows are resampled, so the columns of a row stay together: the interval is a paired one. Fixed
    seeds make it reproducible.

    Args:
        strata: One array [samples, columns] per stratum (task); none is empty.
        statistic: Of the means [..., strata, columns].
    """
    value = float(statistic(np.stack([rows.mean(axis=0) for rows in strata])))
    n = sum(len(rows) for rows in strata)
    if max(len(rows) for rows in strata) < 2:
        return Interval(value, math.nan, math.nan, n)
    means = np.stack(
        [_weights(len(rows), i) @ rows.astype(np.float32) for i, rows in enumerate(strata)], axis=1
    )
    estimates = statistic(means)
    estimates = estimates[np.isfinite(estimates)]
    if not len(estimates):
        return Interval(value, math.nan, math.nan, n)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)


@lru_cache(maxsize=8)
def _weights(n: int, stratum: int) -> Array:
    """How often every resample [RESAMPLES, n] draws each sample, as a share of n."""
    generator = np.random.default_rng([SEED, stratum, n])
    counts = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return (counts / n).astype(np.float32)


def macro_mean(means: Array) -> Array:
    """Mean over strata of the first column: each task counts the same."""
    return means[..., 0].mean(axis=-1)


def difference(means: Array) -> Array:
    """First column minus second."""
    return (means[..., 0] - means[..., 1]).mean(axis=-1)


def ratio(means: Array) -> Array:
    """First column as a fraction of the second, after the mean over strata; NaN over zero."""
    return _divide(means[..., 0].mean(axis=-1), means[..., 1].mean(axis=-1))


def ratio_difference(means: Array) -> Array:
    """Columns 0 / 1 minus columns 2 / 3: two methods, each relative to its own full cache."""
    return ratio(means[..., :2]) - ratio(means[..., 2:])


def _divide(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)
