# SPDX-License-Identifier: Apache-2.0
"""Worker side: what happens in a step, in which order.

    begin_step   check the scheduler's orders; compact what they say
    rewrite      (metadata build) point attention at the live columns; lay out scores and ring
    observe      (after each layer's attention) record queries, accumulate prompt scores
    end_step     from here on, dummy and profiling runs see no request

Compaction runs once per real step, before the forward pass and outside CUDA graphs.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ems_vllm import ops
from ems_vllm.engine.group.layer_stack import split_kv
from ems_vllm.engine.group.prompt_chunks import ScoreRows, score_rows
from ems_vllm.engine.group.to_device import to_device
from ems_vllm.engine.orders import StepOrders, attached
from ems_vllm.engine.worker.requests import Residents, StepRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput

    from ems_vllm.engine.group.compressed_group import CompressedGroup

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


@dataclass(frozen=True)
class Batch:
    """A step in the order of the model runner's batch.

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


class CompressionRuntime:
    """Drives the compressed groups of one worker.

    Args:
        groups: The compressed KV-cache groups.
        batch_order: Gives the request of every row of a batch; the model runner knows.
    """

    def __init__(self, groups: Sequence[CompressedGroup], batch_order: BatchOrder) -> None:
        self.groups = list(groups)
        self._residents = Residents()
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
        residents = self._residents
        orders = residents.begin_step(attached(output))
        for group in self.groups:
            group.release(orders.ended)
        residents.compact(orders.compactions)
        for group in self.groups:
            group.compact([c for c in orders.compactions if c.group_id == group.tensors.group_id])
        residents.check_first_columns(output.num_scheduled_tokens, orders)
        index = {req_id: at for at, req_id in enumerate(output.num_scheduled_tokens)}
        num_scheduled = list(output.num_scheduled_tokens.values())
        for chunk in orders.scored:
            residents.scored(chunk)
        for queries in orders.recorded:
            at = index[queries.req_id]
            residents.recorded(queries, orders.starts[at] + num_scheduled[at])
        self._step = _Step(orders, index, num_scheduled)

    def end_step(self) -> None:
        self._step = None

    @property
    def num_running(self) -> int:
        return len(self._residents)

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


class GroupBinding:
    """What the metadata builders and layers of one group call."""

    def __init__(self, runtime: CompressionRuntime, group: CompressedGroup) -> None:
        self.runtime = runtime
        self.group = group
        self.score_rows: ScoreRows | None = None

    def rewrite(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Called by the metadata builder, for real, dummy and graph-capture batches alike."""
        group, tensors = self.group, self.group.tensors
        batch = self.runtime.batch(metadata)
        self.score_rows = None if batch is None else self._score_rows(batch)
        if tensors.query_ring is not None:
            num_tokens = 0
            if batch is not None and batch.orders.recorded:
                slots = ring_slots(batch, metadata.num_actual_tokens, tensors.obs_window)
                num_tokens = len(slots)
                group.ring_slots[:num_tokens].copy_(
                    to_device(slots, tensors.device, torch.int64), non_blocking=True
                )
            # With piecewise graphs the model runs on more rows than the metadata counts.
            group.ring_slots[num_tokens:].fill_(-1)
        if batch is None:
            rewritten = group.rewrite(metadata, np.zeros(0, np.int64), None)
            return rewritten if group.head_batch is None else group.head_batch.split(rewritten, [])
        first_columns = batch.first_columns(tensors.group_id)
        live = batch.starts + batch.num_scheduled - first_columns * tensors.spec.block_size
        rewritten = group.rewrite(metadata, first_columns, int(live.max(initial=0)))
        if group.head_batch is None:
            return rewritten
        return group.head_batch.split(rewritten, list(batch.row))

    def _score_rows(self, batch: Batch) -> ScoreRows | None:
        tensors = self.group.tensors
        chunks = [chunk for chunk in batch.orders.scored if chunk.group_id == tensors.group_id]
        rows = [batch.row[chunk.req_id] for chunk in chunks]
        # Not every query of a chunk need score.
        starts = [
            int(batch.query_starts[row] + chunk.first_query - batch.starts[row])
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        return score_rows(chunks, starts, tensors.spec.block_size, tensors.device)

    def layer(self, name: str) -> LayerBinding:
        return LayerBinding(self, self.group.layer_names.index(name))


class LayerBinding:
    """What the attention implementation of one layer calls after it has run."""

    def __init__(self, binding: GroupBinding, index: int) -> None:
        tensors = binding.group.tensors
        self._binding = binding
        self._ring_slots = binding.group.ring_slots
        self._num_kv_heads = tensors.spec.num_kv_heads
        self._scale = tensors.scale
        # Read at every use, because new weights may bring others.
        self._layer_scales = tensors.layer_scales
        self._index = index
        self._query_dtype = tensors.query_dtype
        self._global_stride = binding.group.global_stride
        self._ring = None if tensors.query_ring is None else tensors.query_ring[index]
        self._scores = None if tensors.scores is None else tensors.scores[index]

    @property
    def scores_queries(self) -> bool:
        """Whether the batch holds prompt queries that this layer accumulates."""
        return self._scores is not None and self._binding.score_rows is not None

    def observe(
        self, query: torch.Tensor, kv_cache: torch.Tensor, lse: torch.Tensor | None = None
    ) -> None:
        """Record and score the queries of a batch.

        Args:
            query: [num_tokens, num_heads, head_size] - after RoPE, as attention saw it: in the
                model's dtype, or float8_e4m3fn, which is scaled back.
            kv_cache: The layer's cache, with the keys of this batch already written.
            lse: [num_scored_tokens, num_heads], float32, or None - log of the softmax denominators
                that attention computed, sinks left out; computed again where there is none.
        """
        if query.dtype == torch.float8_e4m3fn:
            query = query.to(self._query_dtype) * self._layer_scales[self._index].query
        if self._ring is not None:
            ops.record_queries(query, self._ring_slots[: query.shape[0]], self._ring)
        rows = self._binding.score_rows
        if rows is not None and self._scores is not None:
            key_cache, _ = split_kv(kv_cache, self._num_kv_heads)
            ops.score_queries(
                query if lse is None else query[: lse.shape[0]],
                key_cache,
                rows.block_table,
                rows.query_starts,
                rows.query_lens,
                rows.seq_lens,
                rows.accumulate_lens,
                rows.score_table,
                lse,
                self._scale * self._layer_scales[self._index].key,
                self._global_stride,
                self._scores,
            )


def ring_slots(batch: Batch, num_tokens: int, obs_window: int) -> np.ndarray:
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
