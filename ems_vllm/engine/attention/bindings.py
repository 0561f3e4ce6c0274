# SPDX-License-Identifier: Apache-2.0
"""What binds vLLM's attention to a compressed group: one object a group, one a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm import ops
from ems_vllm.engine.group.layer_stack import split_kv
from ems_vllm.engine.group.prompt_chunks import PromptChunks, prompt_chunks

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from ems_vllm.engine.attention.head_batch import HeadBatch
    from ems_vllm.engine.attention.live_columns import LiveColumns
    from ems_vllm.engine.group.batch import Batch, BatchOf
    from ems_vllm.engine.group.compressed_group import CompressedGroup


class MetadataRewriter:
    """Called by the metadata builders of one group.

    Args:
        group: The group.
        batch_of: Tells the step that metadata belong to.
        live_columns: Where the rewritten tables and lengths of the group lie.
        head_batch: The batch with a row for each kv_head; None where all keep as much.

    Attributes:
        chunks: Prompt chunks of the latest batch that score; None without any.
    """

    def __init__(
        self,
        group: CompressedGroup,
        batch_of: BatchOf,
        live_columns: LiveColumns,
        head_batch: HeadBatch | None = None,
    ) -> None:
        self.group = group
        self.live_columns = live_columns
        self.head_batch = head_batch
        self.chunks: PromptChunks | None = None
        self._batch_of = batch_of

    def rewrite(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Lay out what scores and is recorded, and skip the freed columns.

        For real, dummy and graph-capture batches alike.
        """
        batch = self._batch_of(metadata)
        tensors = self.group.tensors
        self.chunks = None if batch is None else self._chunks(batch)
        if tensors.query_ring is not None:
            tensors.query_ring.place(batch, metadata.num_actual_tokens)
        first_columns, max_seq_len = np.zeros(0, np.int64), None
        if batch is not None:
            first_columns = batch.first_columns(tensors.group_id)
            live = batch.starts + batch.num_scheduled - first_columns * tensors.spec.block_size
            max_seq_len = int(live.max(initial=0))
        rewritten = self.live_columns.skip_freed(metadata, first_columns, max_seq_len)
        if self.head_batch is None:
            return rewritten
        return self.head_batch.split(rewritten, [] if batch is None else list(batch.row))

    def _chunks(self, batch: Batch) -> PromptChunks | None:
        tensors = self.group.tensors
        chunks = [chunk for chunk in batch.orders.scored if chunk.group_id == tensors.group_id]
        rows = [batch.row[chunk.req_id] for chunk in chunks]
        # Not every query of a chunk need score.
        starts = [
            int(batch.query_starts[row] + chunk.first_query - batch.starts[row])
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        return prompt_chunks(chunks, starts, tensors.spec.block_size, tensors.device)

    def layer(self, name: str) -> QueryObserver:
        return QueryObserver(self, self.group.layer_names.index(name))


class QueryObserver:
    """Called by the attention implementation of one layer after it has run."""

    def __init__(self, rewriter: MetadataRewriter, index: int) -> None:
        tensors = rewriter.group.tensors
        ring = tensors.query_ring
        self._rewriter = rewriter
        self._num_kv_heads = tensors.spec.num_kv_heads
        self._scale = tensors.scale
        # Read at every use, because new weights may bring others.
        self._layer_scales = tensors.layer_scales
        self._index = index
        self._query_dtype = tensors.query_dtype
        self._sample_stride = tensors.sample_stride
        self._ring = None if ring is None else (ring.queries[index], ring.slots)
        self._scores = None if tensors.scores is None else tensors.scores[index]

    @property
    def scores_queries(self) -> bool:
        """Whether the batch holds prompt queries that this layer accumulates."""
        return self._scores is not None and self._rewriter.chunks is not None

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
            queries, slots = self._ring
            ops.record_queries(query, slots[: query.shape[0]], queries)
        chunks = self._rewriter.chunks
        if chunks is not None and self._scores is not None:
            key_cache, _ = split_kv(kv_cache, self._num_kv_heads)
            ops.score_queries(
                query[chunks.tokens],
                key_cache,
                chunks.block_table,
                chunks.query_starts,
                chunks.query_lens,
                chunks.seq_lens,
                chunks.accumulate_lens,
                chunks.score_table,
                None if lse is None else lse[chunks.tokens],
                self._scale * self._layer_scales[self._index].key,
                self._sample_stride,
                self._scores,
            )
