# SPDX-License-Identifier: Apache-2.0
"""What a sample says of all: exact bounds of a share (Clopper and Pearson 1934)."""

from __future__ import annotations

import math


def upper_bound(count: int, num: int, confidence: float) -> float:
    """The share that is not exceeded, with this confidence, where `count` of `num` were seen.

    One-sided: the largest share with which so few, or fewer, are seen with a probability of at
    least 1 - confidence.

    Args:
        count: Seen, 0 to num.
        num: Looked at, independently of each other, >= 0.
        confidence: In (0, 1).
    """
    if count >= num:
        return 1.0
    low, high = count / num, 1.0
    # Bisection to the last bit that a double has between them.
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(count, num, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def lower_bound(count: int, num: int, confidence: float) -> float:
    """The share that is reached, with this confidence; like upper_bound."""
    return 1.0 - upper_bound(num - count, num, confidence)


def needed(share: float, confidence: float) -> int:
    """How many must be looked at, and none seen, for an upper bound of at most `share`.

    Args:
        share: In (0, 1).
        confidence: In (0, 1).
    """
    return math.ceil(math.log(1 - confidence) / math.log1p(-share) - 1e-9)


def _at_most(count: int, num: int, share: float) -> float:
    """Probability of so many or fewer.

    Args:
        share: In [0, 1].
    """
    if share <= 0 or share >= 1:
        return float(share <= 0)
    seen, unseen = math.log(share), math.log1p(-share)
    # By logarithms: coefficients of many are beyond a double.
    return math.fsum(
        math.exp(_log_choose(num, k) + k * seen + (num - k) * unseen) for k in range(count + 1)
    )


def _log_choose(num: int, k: int) -> float:
    return math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1)
