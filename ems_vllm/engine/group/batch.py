# SPDX-License-Identifier: Apache-2.0
"""A step in the order of the model runner's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from ems_vllm.engine.orders import StepOrders


@dataclass(frozen=True)
class Batch:
    """Orders of a step, and where the requests that they name lie in the batch.

    Attributes:
        orders: The scheduler's.
        row: Row of each request.
        order: [num_reqs] - for each row, where its request is in the lists of `orders`.
        query_starts: [num_reqs] - for each row, its first token in the batch.
        num_scheduled: [num_reqs] - for each row, its tokens in the batch.
        starts: [num_reqs] - for each row, tokens processed before the step.
    """

    orders: StepOrders
    row: dict[str, int]
    order: np.ndarray
    query_starts: np.ndarray
    num_scheduled: np.ndarray
    starts: np.ndarray

    def first_columns(self, group_id: int) -> np.ndarray:
        """[num_reqs] - for each row, its first live column."""
        return np.asarray(self.orders.first_columns[group_id])[self.order]


BatchOf: TypeAlias = "Callable[[CommonAttentionMetadata], Batch | None]"
"""The step that metadata belong to; None for dummy, profiling, capture and warm-up batches."""
