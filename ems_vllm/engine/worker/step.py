# SPDX-License-Identifier: Apache-2.0
"""A step of a worker, in order.

    begin_step   check the scheduler's orders; compact what they say
    batch        (metadata build) the step in the order of the model runner's batch
    end_step     from here on, dummy and profiling runs see no request

Compaction runs once per real step, before the forward pass and outside CUDA graphs. In between,
metadata builders and layers work through attention/bindings.py.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ems_vllm.engine.group.batch import Batch
from ems_vllm.engine.orders import StepOrders, attached
from ems_vllm.engine.report import StepReport
from ems_vllm.engine.worker.requests import StepRefused, WorkerRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput

    from ems_vllm.engine.group.compressed_group import CompressedGroup
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.engine.worker.kept_columns import KeptColumns
    from ems_vllm.engine.worker.meter import Meter

    BatchOrder = Callable[[CommonAttentionMetadata], Sequence[str]]


@dataclass(frozen=True)
class _Step:
    """The step that runs.

    Attributes:
        orders: The scheduler's.
        index: Where a request is in the lists of `orders`.
        num_scheduled: Tokens of the step, in the same order.
    """

    orders: StepOrders
    index: dict[str, int]
    num_scheduled: list[int]


class StepRunner:
    """Runs the orders of every step on the compressed groups of one worker.

    Args:
        groups: The compressed KV-cache groups.
        batch_order: Gives the request of every row of a batch; the model runner knows.
        kept: What is held of requests, where a coverage decides; None where all of a budget stays.
        meter: Measures compactions, where somebody is told; else None.
    """

    def __init__(
        self,
        groups: Sequence[CompressedGroup],
        batch_order: BatchOrder,
        kept: KeptColumns | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.groups = list(groups)
        self._kept = kept
        self._meter = meter
        self._kept_from: list[int] = []
        self._requests = WorkerRequests()
        self._batch_order = batch_order
        self._step: _Step | None = None
        self._is_warming_up = False

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """vLLM runs requests of its own, which no scheduler planned; nothing is compressed."""
        self._is_warming_up = True
        try:
            yield
        finally:
            self._is_warming_up = False

    def begin_step(self, output: SchedulerOutput) -> None:
        """Check the orders of a step and compact what they say, before anything of it runs.

        Raises:
            StepRefused: this worker holds something else than the scheduler believes.
        """
        if self._is_warming_up:
            return
        requests = self._requests
        orders = requests.begin_step(attached(output))
        for group in self.groups:
            group.release(orders.ended)
        requests.compact(orders.compactions)
        if self._kept is None:
            self._compact(orders.compactions)
        requests.check_first_columns(output.num_scheduled_tokens, orders)
        for chunk in orders.scored:
            requests.scored(chunk)
        if self._kept is not None:
            orders = self._compact_covered(self._kept, orders, list(output.num_scheduled_tokens))
        index = {req_id: at for at, req_id in enumerate(output.num_scheduled_tokens)}
        num_scheduled = list(output.num_scheduled_tokens.values())
        for queries in orders.recorded:
            at = index[queries.req_id]
            requests.recorded(queries, orders.starts[at] + num_scheduled[at])
        self._step = _Step(orders, index, num_scheduled)

    def _compact(self, orders: Sequence[Compaction]) -> list[dict[str, int]]:
        """Compact all groups; by group and request, the first column of what is kept."""
        meter = self._meter if orders else None
        with nullcontext() if meter is None else meter.measuring():
            return [
                group.compact(
                    [order for order in orders if order.group_id == group.tensors.group_id]
                )
                for group in self.groups
            ]

    def _compact_covered(
        self, kept: KeptColumns, planned: StepOrders, req_ids: Sequence[str]
    ) -> StepOrders:
        """Compact what is held; the orders that go on from there."""
        kept.release(planned.ended)
        kept.check_freed(planned, req_ids)
        found = self._compact(kept.compactions(planned.compactions))
        kept_from = {
            (req_id, group.tensors.group_id): first
            for group, of_group in zip(self.groups, found, strict=True)
            for req_id, first in of_group.items()
        }
        self._kept_from = kept.keep(kept_from)
        return kept.held(planned, req_ids)

    def take_report(self) -> StepReport | None:
        """What the scheduler is to know, once the output of a step is made; None for nothing."""
        first_columns, self._kept_from = self._kept_from, []
        measured = self._meter.take() if self._meter is not None else None
        if not first_columns and measured is None:
            return None
        return StepReport(first_columns, measured)

    def end_step(self) -> None:
        self._step = None

    @property
    def num_running(self) -> int:
        return len(self._requests)

    def batch(self, metadata: CommonAttentionMetadata) -> Batch | None:
        """The step in row order; None for dummy, profiling, capture and warm-up batches.

        Raises:
            StepRefused: the batch is not the one that was scheduled.
        """
        step = self._step
        if step is None:
            return None
        req_ids = self._batch_order(metadata)
        try:
            order = np.fromiter((step.index[req_id] for req_id in req_ids), np.int64, len(req_ids))
        except KeyError as error:
            raise StepRefused("a batch runs", "requests of the step", f"{error}") from None
        if len(order) != len(step.index):
            raise StepRefused("a batch runs", f"{len(step.index)} requests", len(order))
        return Batch(
            orders=step.orders,
            row={req_id: row for row, req_id in enumerate(req_ids)},
            order=order,
            query_starts=metadata.query_start_loc_cpu.numpy()[: len(order)],
            num_scheduled=np.asarray(step.num_scheduled)[order],
            starts=np.asarray(step.orders.starts)[order],
        )


def batch_order(runner: Any) -> BatchOrder:
    """How a model runner orders requests in its batches.

    Args:
        runner: vLLM's GPUModelRunner, of version 1 or 2.
    """
    if hasattr(runner, "req_states"):

        def order_v2(metadata: CommonAttentionMetadata) -> list[str]:
            by_index = runner.req_states.index_to_req_id
            return [by_index[index] for index in metadata.req_idx.tolist()]

        return order_v2

    def order_v1(metadata: CommonAttentionMetadata) -> list[str]:
        return list(runner.input_batch.req_ids[: runner.input_batch.num_reqs])

    return order_v1
