# SPDX-License-Identifier: Apache-2.0
"""What ranks that hold other kv_heads of the same layers tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.policies.context import sum_alone

if TYPE_CHECKING:
    from torch import Tensor


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


@dataclass(frozen=True)
class Ranks:
    """Of a rank that has all kv_heads, unless others are given.

    Attributes:
        gather: The same tensor of every rank, in their order, on the host; a few numbers.
        sum: The sum of a tensor over all ranks, on its device, and how many they are.
    """

    gather: Callable[[Tensor], list[Tensor]] = _alone
    sum: Callable[[Tensor], tuple[Tensor, int]] = sum_alone
