# SPDX-License-Identifier: Apache-2.0
"""Quantiles of lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of them do not exceed.

    Args:
        values: At least one, in any order.
        share: In (0, 1].
    """
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
