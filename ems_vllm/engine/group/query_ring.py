# SPDX-License-Identifier: Apache-2.0
"""The last queries of requests that are about to be compressed, of all layers of a group.

A request has a row of it, which the scheduler deals out (scheduler/dealer.py), for the last
`obs_window` tokens before a compaction.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ems_vllm.engine.group.to_device import to_device

if TYPE_CHECKING:
    from ems_vllm.engine.group.batch import Batch


class QueryRing:
    """Queries of one group.

    Args:
        num_layers: Of the group on this worker.
        num_rows: Requests whose queries are recorded at a time.
        obs_window: Queries of a row.
        num_heads: Query heads of a layer on this rank.
        head_size: Elements of a query.
        max_num_tokens: Largest batch, CUDA-graph padding included.
        dtype: Of the model.
        device: Of the cache.
        pool: Where the queries are allocated; they may get lost between requests.

    Attributes:
        queries: [num_layers, num_rows, obs_window, num_heads, head_size], of `dtype`.
        slots: [max_num_tokens], int64 - where each token of the batch goes among the flattened
            rows, -1 for nowhere. CUDA graphs capture its address; it never moves.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        obs_window: int,
        num_heads: int,
        head_size: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: AbstractContextManager[Any],
    ) -> None:
        shape = (num_layers, num_rows, obs_window, num_heads, head_size)
        with pool:
            self.queries = torch.zeros(shape, dtype=dtype, device=device)
        self.slots = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)

    @property
    def obs_window(self) -> int:
        return self.queries.shape[2]

    def place(self, batch: Batch | None, num_tokens: int) -> None:
        """Write down where the queries of a batch go.

        Args:
            batch: None for one that is no step.
            num_tokens: Of the batch, padding included.
        """
        num_placed = 0
        if batch is not None and batch.orders.recorded:
            slots = slots_of(batch, num_tokens, self.obs_window)
            num_placed = len(slots)
            self.slots[:num_placed].copy_(
                to_device(slots, self.slots.device, torch.int64), non_blocking=True
            )
        # With piecewise graphs the model runs on more rows than the metadata counts.
        self.slots[num_placed:].fill_(-1)

    @staticmethod
    def row_bytes(obs_window: int, num_heads: int, head_size: int, itemsize: int) -> int:
        """Bytes of a row in one layer."""
        return obs_window * num_heads * head_size * itemsize


def slots_of(batch: Batch, num_tokens: int, obs_window: int) -> np.ndarray:
    """[num_tokens]: slot of the query ring for every token, -1 for those that are not recorded.

    No step reaches past a compaction, so when queries score, a rejected draft's has been
    overwritten by the token that came in its place.
    """
    slots = np.full(num_tokens, -1, np.int64)
    for queries in batch.orders.recorded:
        row = batch.row[queries.req_id]
        stop = batch.query_starts[row] + batch.num_scheduled[row]
        end = batch.starts[row] + batch.num_scheduled[row]
        columns = np.arange(end - queries.num_queries, end) % obs_window
        slots[stop - queries.num_queries : stop] = queries.ring_row * obs_window + columns
    return slots
