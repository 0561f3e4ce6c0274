# SPDX-License-Identifier: Apache-2.0
"""What a policy sees of the requests that are compressed in one step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ems_vllm import ops

if TYPE_CHECKING:
    from torch import Tensor

# Keys that are gathered at a time, with what is made of them.
KEY_SLICE_BYTES = 16 << 20


@dataclass(frozen=True)
class CompactionContext:
    """Live cache of the rows that are compressed now; a row is one request.

    "Live" coordinates: entry e of a row lies in column e // block_size of its `block_table` row.
    Column 0 is the first column that still holds the request's entries.

    Attributes:
        key_cache, value_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size],
            strided views of the cache; as stored, so a float8 one is yet to be scaled.
        block_table: [num_rows, max_columns], int32 - live columns, padded with 0.
        num_entries: [num_rows], int32 - entries to choose from (the tail is not among them).
        num_live: [num_rows], int32 - entries and tail tokens.
        num_scored: [num_rows], int32 - leading entries that have an accumulated score.
        budgets: [num_rows], int32 - entries to keep, whole blocks.
        num_protected: [num_rows], int32 - leading entries (sinks) that always stay as they are.
        target_columns: [num_rows], int32 - live column where the kept entries go.
        num_represented: [num_rows], int32 - tokens that the recorded queries stand for, those whose
            queries were not accumulated: the generated ones since the last compaction (since the
            prompt's end for the first); all tokens at the first compaction of a prompt that was too
            short to be compressed, and hence to be accumulated. 0 at the prompt's end.
        max_entries, max_budget: the largest `num_entries` and `budgets`, on the host.
        scale: softmax scale of the model.
        paged_scores: [num_layers, num_pages, num_kv_heads, block_size], float32, or None.
        score_table: [num_rows, max_columns], int32, or None - page of each live column.
        query_ring: [num_layers, num_ring_rows, obs_window, num_heads, head_size], or None.
        ring_rows: [num_rows], int32 - the request's row of the ring.
        num_queries: [num_rows], int32 - recorded queries, at most obs_window.
        end_positions: [num_rows], int32 - position after the newest recorded query.
        key_scales: [num_layers], float32, or None - factor of stored keys; 1 each where None.
    """

    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    num_entries: Tensor
    num_live: Tensor
    num_scored: Tensor
    budgets: Tensor
    num_protected: Tensor
    target_columns: Tensor
    num_represented: Tensor
    max_entries: int
    max_budget: int
    scale: float
    paged_scores: Tensor | None
    score_table: Tensor | None
    query_ring: Tensor | None
    ring_rows: Tensor
    num_queries: Tensor
    end_positions: Tensor
    key_scales: Tensor | None = None

    @property
    def num_layers(self) -> int:
        return self.key_cache.shape[0]

    @property
    def num_rows(self) -> int:
        return self.block_table.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.key_cache.shape[2]

    @property
    def block_size(self) -> int:
        return self.key_cache.shape[3]

    @cached_property
    def is_entry(self) -> Tensor:
        """[1, num_rows, 1, max_entries], bool: the entry exists in this row."""
        return (self._entries < self.num_entries[:, None])[None, :, None, :]

    @property
    def _entries(self) -> Tensor:
        """[max_entries], int32: 0, 1, 2, ..."""
        return torch.arange(self.max_entries, dtype=torch.int32, device=self.block_table.device)

    def new_scores(self) -> Tensor:
        """[num_layers, num_rows, num_kv_heads, max_entries], float32, uninitialised."""
        return torch.empty(
            (self.num_layers, self.num_rows, self.num_kv_heads, self.max_entries),
            dtype=torch.float32,
            device=self.key_cache.device,
        )

    def accumulated_scores(self, window: Tensor) -> Tensor:
        """Attention that the entries received from all queries so far.

        The prompt's queries were accumulated, all of them. Of the generated tokens only the last
        ones before a compaction are recorded, so they count for all since the one before (ours):

            carried + window * num_represented / num_queries

        Otherwise a generated token would have to be attended to far more than one of the prompt
        to be kept, and a long generation would forget its own middle.

        Args:
            window: Of window_scores.

        Returns:
            [num_layers, num_rows, num_kv_heads, max_entries], float32.
        """
        each_counts_for = self.num_represented / self.num_queries.clamp(min=1)
        return self._carried_scores().addcmul_(window, each_counts_for[None, :, None, None])

    def _carried_scores(self) -> Tensor:
        """Scores that lie in the pages: of the prompt, or carried by the entries that were kept.

        Returns:
            [num_layers, num_rows, num_kv_heads, max_entries], float32; 0 where there is none.
        """
        assert self.paged_scores is not None
        assert self.score_table is not None
        columns = -(-self.max_entries // self.block_size)
        pages = self.score_table[:, :columns].long()
        gathered = self.paged_scores[:, pages].transpose(2, 3).flatten(3)[..., : self.max_entries]
        is_unscored = (self._entries >= self.num_scored[:, None])[None, :, None, :]
        # No product: an unscored slot may hold anything, NaN included.
        return gathered.masked_fill_(is_unscored, 0.0)

    def window_scores(self) -> Tensor:
        """Attention of the recorded queries, summed over them.

        Returns:
            [num_layers, num_rows, num_kv_heads, max_entries], float32; 0 beyond a row's entries.
        """
        assert self.query_ring is not None
        scores = self.new_scores()
        ops.score_window(
            self.query_ring,
            self.ring_rows,
            self.num_queries,
            self.end_positions,
            self.key_cache,
            self.block_table,
            self.num_live,
            self.num_entries,
            self.scale,
            scores,
            self.key_scales,
        )
        return scores

    def key_norms(self) -> Tensor:
        """Euclidean norms of the entries' keys, as stored, gathered `KEY_SLICE_BYTES` at a time.

        Returns:
            [num_layers, num_rows, num_kv_heads, max_entries], float32; anything beyond a row's
            entries.
        """
        num_columns = -(-self.max_entries // self.block_size)
        columns = self.block_table[:, :num_columns].flatten()
        # Every block of every layer.
        layers = torch.arange(self.num_layers, device=columns.device)
        layers = layers.repeat_interleave(len(columns))
        blocks = columns.long().repeat(self.num_layers)
        _, _, *block_shape, head_size = self.key_cache.shape
        norms = torch.empty((len(blocks), *block_shape), device=columns.device)
        # Beside what is gathered: a float8 key in bfloat16, and the float32 that torch computes in.
        block_bytes = norms[:1].numel() * head_size * (self.key_cache.itemsize + 2 + 4)
        step = max(1, KEY_SLICE_BYTES // block_bytes)
        for at in range(0, len(blocks), step):
            part = slice(at, at + step)
            norms[part] = _norms(self.key_cache[layers[part], blocks[part]])
        by_row = norms.unflatten(0, (self.num_layers, self.num_rows, num_columns))
        return by_row.transpose(2, 3).flatten(3)[..., : self.max_entries]


def _norms(keys: Tensor) -> Tensor:
    """Over the last dimension, float32."""
    if keys.dtype == torch.float8_e4m3fn:
        # torch computes nothing in float8; bfloat16 holds every number of it.
        keys = keys.to(torch.bfloat16)
    return torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
