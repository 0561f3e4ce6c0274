# SPDX-License-Identifier: Apache-2.0
"""What a worker holds of requests of which a coverage decides how much stays.

The scheduler plans as if all of a budget stayed, and so do its orders: columns, block ids and
numbers of entries are those of the plan. A worker that kept less begins later. Here orders become
such of what is held, so that nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ems_vllm.engine.worker.requests import StepRefused
from ems_vllm.engine.worker.stages import UNDECIDED, Stage

if TYPE_CHECKING:
    from ems_vllm.engine.orders import Compaction, ScoredChunk, StepOrders


class KeptColumns:
    """The columns of what all requests of a worker have kept.

    Args:
        block_sizes: Of the compressed groups of which it has layers, by their index. Where it has
            none, as a stage of a pipeline may, there is nothing to hold.
        stage: Of this worker.
    """

    def __init__(self, block_sizes: Mapping[int, int], stage: Stage | None = None) -> None:
        self._block_sizes = block_sizes
        self._stage = stage or Stage()
        # Of the step: its compactions as planned, and the first columns that were decided before.
        self._planned: Sequence[Compaction] = ()
        self._decided: list[int] = []
        # By request and group, [first, tail) of what was kept.
        self._columns: dict[str, dict[int, tuple[int, int]]] = {}

    def release(self, req_ids: Sequence[str]) -> None:
        """Requests gave their blocks back."""
        for req_id in req_ids:
            self._columns.pop(req_id, None)

    def check_freed(self, planned: StepOrders, req_ids: Sequence[str]) -> None:
        """Before anything of a step is read: nothing that is held was given back.

        Args:
            planned: The scheduler's orders.
            req_ids: In the order of `planned.starts`.

        Raises:
            StepRefused: the scheduler gave columns back that are still held.
        """
        for group_id in self._block_sizes:
            for req_id, count in zip(req_ids, planned.freed_columns[group_id], strict=True):
                first, _ = self._of(req_id, group_id)
                if count > first:
                    what = f"request {req_id}, group {group_id}, is attended to"
                    raise StepRefused(
                        what, f"columns before {count} to be free", f"it from {first}"
                    )

    def compactions(self, planned: Sequence[Compaction]) -> list[Compaction]:
        """Compactions of what is held, of groups of which this worker has layers.

        Args:
            planned: The scheduler's, of a step and all groups.
        """
        self._planned, self._decided = planned, self._stage.received(len(planned))
        return [
            self._compaction(order, order.num_kept if first == UNDECIDED else order.tail - first)
            for order, first in zip(planned, self._decided, strict=True)
            if order.group_id in self._block_sizes
        ]

    def _compaction(self, order: Compaction, num_kept: int) -> Compaction:
        before, tail_before = self._of(order.req_id, order.group_id)
        num_gone = before - order.first_before
        # Score pages of its own has only what was never compressed, of which nothing is gone.
        return order._replace(
            first_before=before,
            # What is held may be less than what may stay.
            first=order.tail - num_kept if num_kept else max(order.first, before),
            num_kept=num_kept,
            block_ids=order.block_ids[num_gone:],
            num_scored=self._without(order, order.num_scored, num_gone),
            kept_before=tail_before - before,
        )

    def keep(self, kept_from: Mapping[tuple[str, int], int]) -> list[int]:
        """Take note of what `compactions` have kept, and tell the next stage.

        Args:
            kept_from: By request and group of which this worker has layers, the first column of
                what was kept.

        Returns:
            See StepReport.first_columns.
        """
        firsts = []
        for order, first in zip(self._planned, self._decided, strict=True):
            if order.group_id in self._block_sizes:
                first = kept_from[order.req_id, order.group_id]
                columns = self._columns.setdefault(order.req_id, {})
                columns[order.group_id] = (first, order.tail)
            firsts.append(first)
        self._stage.pass_on(firsts)
        return firsts

    def held(self, planned: StepOrders, req_ids: Sequence[str]) -> StepOrders:
        """Orders of a step, once its compactions are done, in terms of what is held.

        Args:
            planned: The scheduler's.
            req_ids: In the order of `planned.starts`.
        """
        first_columns = {
            group_id: [self._of(req_id, group_id)[0] for req_id in req_ids]
            for group_id in self._block_sizes
        }
        scored = [
            self._chunk(chunk) for chunk in planned.scored if chunk.group_id in self._block_sizes
        ]
        return replace(planned, first_columns=first_columns, scored=scored)

    def _chunk(self, chunk: ScoredChunk) -> ScoredChunk:
        first, _ = self._of(chunk.req_id, chunk.group_id)
        num_gone = first - chunk.first_column
        return chunk._replace(
            first_column=first,
            block_ids=chunk.block_ids[num_gone:],
            num_accumulated=self._without(chunk, chunk.num_accumulated, num_gone),
        )

    def _without(self, order: Compaction | ScoredChunk, num_entries: int, num_gone: int) -> int:
        """Of so many leading entries, those that are held."""
        return max(0, num_entries - num_gone * self._block_sizes[order.group_id])

    def _of(self, req_id: str, group_id: int) -> tuple[int, int]:
        return self._columns.get(req_id, {}).get(group_id, (0, 0))
