# SPDX-License-Identifier: Apache-2.0
"""A query ring whose slots say whose query it is. Every group records the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from engine.block_tables import Request

from ems_vllm.engine.group.batch import Batch
from ems_vllm.engine.group.query_ring import slots_of


class SymbolicRing:
    """Rows of the last queries.

    Args:
        num_rows, obs_window: As a worker has them.
    """

    def __init__(self, num_rows: int, obs_window: int) -> None:
        self.num_rows = num_rows
        self._obs_window = obs_window
        self._rows: list[list[Any]] = [[None] * obs_window for _ in range(num_rows)]

    def record(self, orders: Any, requests: Sequence[Request]) -> None:
        """The queries of a step, where the worker's own code puts them."""
        starts = list(itertools.accumulate((r.num_scheduled for r in requests), initial=0))
        batch = Batch(
            orders=orders,
            row={request.req_id: row for row, request in enumerate(requests)},
            order=np.arange(len(requests)),
            query_starts=np.array(starts[:-1]),
            num_scheduled=np.array([request.num_scheduled for request in requests]),
            starts=np.array([request.num_computed for request in requests]),
        )
        window = self._obs_window
        for token, slot in enumerate(slots_of(batch, starts[-1], window or 1).tolist()):
            if slot >= 0:
                index = max(i for i, first in enumerate(starts[:-1]) if first <= token)
                position = requests[index].num_computed + token - starts[index]
                self._rows[slot // window][slot % window] = (requests[index].req_id, position)

    def check(self, order: Any) -> None:
        """The recorded queries of a Compaction are the request's newest."""
        if order.ring_row < 0:
            assert not self._obs_window, order
            return
        row = self._rows[order.ring_row]
        for position in range(order.num_computed - order.num_queries, order.num_computed):
            found = row[position % len(row)]
            assert found == (order.req_id, position), (order, position, found)
        assert order.num_queries == min(len(row), order.num_computed)
