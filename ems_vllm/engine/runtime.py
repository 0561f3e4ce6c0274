# SPDX-License-Identifier: Apache-2.0
"""Worker side: what happens in a step, in which order.

    begin_step   follow the scheduler output; compact the requests that are due
    rewrite      (metadata build) point attention at the live columns; lay out scores and ring
    observe      (after each layer's attention) record queries, accumulate prompt scores
    end_step     from here on, dummy and profiling runs see no request

Compaction runs once per real step, before the forward pass and outside CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ems_vllm import ops
from ems_vllm.engine.host_tensors import to_device
from ems_vllm.engine.layer_stack import split_kv
from ems_vllm.engine.request_table import RequestTable, RunningRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput

    from ems_vllm.engine.compressed_group import CompressedGroup
    from ems_vllm.engine.score_rows import ScoreRows

    BatchOrder = Callable[[CommonAttentionMetadata], Sequence[str]]


class CompressionRuntime:
    """Drives the compressed groups of one worker.

    Args:
        groups: The compressed KV-cache groups.
        max_num_seqs: Most requests that run at a time.
        batch_order: Gives the request of every row of a batch; the model runner knows.
    """

    def __init__(
        self, groups: Sequence[CompressedGroup], max_num_seqs: int, batch_order: BatchOrder
    ) -> None:
        self.groups = list(groups)
        self._table = RequestTable(max_num_seqs)
        self._batch_order = batch_order
        self._scheduled: dict[str, RunningRequest] = {}

    def begin_step(self, output: SchedulerOutput) -> None:
        """Follow the scheduler and compact what is due, before anything of the step runs."""
        update = self._table.update(output)
        for group in self.groups:
            group.begin_step(update.removed, update.admitted, update.scheduled)
        self._scheduled = {request.info.req_id: request for request in update.scheduled}

    def end_step(self) -> None:
        self._scheduled = {}

    @property
    def num_running(self) -> int:
        return len(self._table)

    def rows(self, metadata: CommonAttentionMetadata) -> list[tuple[RunningRequest, int]]:
        """Requests of the batch in row order, with the index of their first query token."""
        if not self._scheduled:
            return []
        starts = metadata.query_start_loc_cpu.tolist()
        return [
            (self._scheduled[req_id], start)
            for req_id, start in zip(self._batch_order(metadata), starts, strict=False)
        ]


class GroupBinding:
    """What the metadata builders and layers of one group call."""

    def __init__(self, runtime: CompressionRuntime, group: CompressedGroup) -> None:
        self.runtime = runtime
        self.group = group
        self.score_rows: ScoreRows | None = None

    def rewrite(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Called by the metadata builder, for real, dummy and graph-capture batches alike."""
        group = self.group
        rows = self.runtime.rows(metadata)
        self.score_rows = group.score_rows(rows)
        tensors = group.tensors
        if tensors.query_ring is not None:
            slots = ring_slots(rows, metadata.num_actual_tokens, tensors.obs_window)
            group.ring_slots[: len(slots)].copy_(
                to_device(slots, tensors.device, torch.int64), non_blocking=True
            )
            # With piecewise graphs the model runs on more rows than the metadata counts.
            group.ring_slots[len(slots) :].fill_(-1)
        first_columns = [group.first_column(request) for request, _ in rows]
        max_seq_len = None
        if rows:
            max_seq_len = max(
                request.num_computed + request.num_scheduled - first * tensors.spec.block_size
                for (request, _), first in zip(rows, first_columns, strict=True)
            )
        return group.rewrite(metadata, first_columns, max_seq_len)

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


def ring_slots(
    rows: Sequence[tuple[RunningRequest, int]], num_tokens: int, obs_window: int
) -> list[int]:
    """Slot of the query ring for every token of a batch, -1 for the ones that are not recorded.

    Of a chunk only the last `obs_window` queries are recorded; the query at position p goes to
    column p % obs_window of the request's row. No step reaches past a compaction, so when queries
    score, a rejected draft's has been overwritten by the token that came in its place.
    """
    slots = [-1] * num_tokens
    for request, start in rows:
        num_recorded = min(request.num_scheduled, obs_window)
        stop = start + request.num_scheduled
        position = request.num_computed + request.num_scheduled - num_recorded
        base = request.ring_row * obs_window
        for token in range(stop - num_recorded, stop):
            slots[token] = base + position % obs_window
            position += 1
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
