# SPDX-License-Identifier: Apache-2.0
"""What a policy sees of the requests that are compressed in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from ems_vllm import ops

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.rotation import Rotation

# What is made at a time of queries, or of what keys have in common.
SLICE_BYTES = 32 << 20

# Below any mean square of real logits.
_EPS = 1e-12


def sum_alone(tensor: Tensor) -> tuple[Tensor, int]:
    """The sum over ranks, and how many they are, where there is one."""
    return tensor, 1


@dataclass(frozen=True)
class CompactionContext:
    """Live cache of the rows that are compressed now; a row is one request, or one kv_head of it.

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
        accumulated_pages: [num_layers, num_pages, num_kv_heads, block_size], float32, or None.
        score_table: [num_rows, max_columns], int32, or None - page of each live column.
        query_ring: [num_layers, num_ring_rows, obs_window, num_heads, head_size], or None.
        ring_rows: [num_rows], int32 - the request's row of the ring.
        num_queries: [num_rows], int32 - recorded queries, at most obs_window.
        end_positions: [num_rows], int32 - position after the newest recorded query.
        key_scales: [num_layers], float32, or None - factor of stored keys; 1 each where None.
        rotations: By layer, what RoPE did to the keys; None where there was none, or it is not
            known, and empty where it is of none.
        is_untouched: [num_rows], bool - compressed for the first time: entry e is that of position
            e. Others mix entries of any positions.
        rows_together: Consecutive rows that share blocks: the kv_heads of a request, where each is
            a row. Divides num_rows.
        output_weights: By layer, [hidden_size, num_heads * head_size], float - what turns the
            outputs of the heads of this rank into the layer's; empty where no component asks.
        layer_ids: Indices of the layers in the model; empty where they are not known.
        first_head, first_kv_head: Of this rank's query heads and kv_heads the first one's index
            among the layer's.
        sum_of_ranks: Sums a tensor over the ranks that hold other kv_heads of the same layers.
        is_protected: [num_layers, num_rows, num_kv_heads, max_entries], bool, or None for none -
            entries beside the sinks that always stay as they are. Budgets hold them and the sinks.
        num_merged: [], int64, or None - a counter to which the entries are added that are merged.
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
    accumulated_pages: Tensor | None
    score_table: Tensor | None
    query_ring: Tensor | None
    ring_rows: Tensor
    num_queries: Tensor
    end_positions: Tensor
    is_untouched: Tensor
    key_scales: Tensor | None = None
    rotations: Sequence[Rotation | None] = ()
    rows_together: int = 1
    is_protected: Tensor | None = None
    output_weights: Sequence[Tensor] = ()
    layer_ids: Sequence[int] = ()
    first_head: int = 0
    first_kv_head: int = 0
    sum_of_ranks: Callable[[Tensor], tuple[Tensor, int]] = sum_alone
    num_merged: Tensor | None = None

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

    @property
    def device(self) -> torch.device:
        return self.key_cache.device

    @cached_property
    def is_entry(self) -> Tensor:
        """[1, num_rows, 1, max_entries], bool: the entry exists in this row."""
        return (self._entries < self.num_entries[:, None])[None, :, None, :]

    @cached_property
    def is_eligible(self) -> Tensor:
        """The entry exists, is no sink, and is not protected.

        [1, num_rows, 1, max_entries], bool; where there are protected entries, of the shape of a
        score.
        """
        is_free = (self._entries >= self.num_protected[:, None])[None, :, None, :]
        is_free.logical_and_(self.is_entry)
        return is_free if self.is_protected is None else is_free & ~self.is_protected

    @property
    def num_reserved(self) -> Tensor:
        """[num_rows], integers: sinks and protected entries, of the kv_head that has most."""
        if self.is_protected is None:
            return self.num_protected
        is_reserved = self.is_entry & ~self.is_eligible
        return is_reserved.sum(-1).amax((0, 2))

    @cached_property
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
        assert self.accumulated_pages is not None
        assert self.score_table is not None
        columns = -(-self.max_entries // self.block_size)
        pages = self.score_table[:, :columns].long()
        gathered = (
            self.accumulated_pages[:, pages].transpose(2, 3).flatten(3)[..., : self.max_entries]
        )
        is_unscored = (self._entries >= self.num_scored[:, None])[None, :, None, :]
        # No product: an unscored slot may hold anything, NaN included.
        return gathered.masked_fill_(is_unscored, 0.0)

    def window_scores(self, peaks: Tensor | None = None) -> Tensor:
        """Attention of the recorded queries, summed over them.

        Args:
            peaks: Like the result; becomes the most that one of them pays, in one query head.

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
            peaks,
        )
        return scores

    def mass_keys(self) -> Tensor:
        """What makes a key receive e times the attention, from the queries to come (ours).

        Attention has no place for a constant on a single logit; the queries of a head, however,
        have much in common, also after RoPE, whose slow dimensions hardly turn. Of the keys along
        the mean recorded query q of a kv_head's group, the one that is closest to

            scale * (any recorded query) . key = 1

        in the mean square: where queries disagree it is short, and where nothing is recorded 0.

        Returns:
            [num_layers, num_rows, num_kv_heads, head_size], float32, in the units of stored keys.
        """
        assert self.query_ring is not None
        _, _, window, num_heads, head_size = self.query_ring.shape
        slots = torch.arange(window, dtype=torch.int32, device=self.ring_rows.device)
        ages = (self.end_positions[:, None] - 1 - slots) % window
        is_recorded = (ages < self.num_queries[:, None])[:, :, None, None]
        keys = torch.empty(
            (self.num_layers, self.num_rows, self.num_kv_heads, head_size), device=slots.device
        )
        # As stored, in float32, and once more where products are made.
        row_bytes = window * num_heads * head_size * (self.query_ring.itemsize + 2 * 4)
        at_once = max(1, SLICE_BYTES // row_bytes)
        for layers, rows in slices(range(self.num_layers), self.num_rows, at_once):
            queries = self.query_ring[layers, self.ring_rows[rows].long()].float()
            # No product: a slot that records nothing may hold anything, NaN included.
            queries = queries.masked_fill_(~is_recorded[rows], 0.0)
            # [layers, rows, num_kv_heads, window * group, head_size]; unrecorded ones are 0.
            queries = queries.unflatten(3, (self.num_kv_heads, -1)).transpose(2, 3)
            keys[layers, rows] = _key_of_one(queries.flatten(3, 4), self.scale)
        return keys if self.key_scales is None else keys.div_(self.key_scales[:, None, None, None])

    def mean_of_heads(self, scores: Tensor) -> Tensor:
        """Scores of a layer, for its kv_heads alike: their mean, over all ranks.

        Args:
            scores: [num_layers, num_rows, num_kv_heads, max_entries], float32; overwritten.
        """
        assert self.rows_together == 1, "kv_heads that are rows have entries of their own"
        total, num_ranks = self.sum_of_ranks(scores.sum(2, keepdim=True))
        return scores.copy_(total.div_(num_ranks * self.num_kv_heads))

    def key_norms(self) -> Tensor:
        """Euclidean norms of the entries' keys, as stored.

        Returns:
            [num_layers, num_rows, num_kv_heads, max_entries], float32; 0 beyond a row's entries.
        """
        return self._norms(self.key_cache)

    def value_norms(self) -> Tensor:
        """Euclidean norms of the entries' values, as stored; like key_norms."""
        return self._norms(self.value_cache)

    def _norms(self, cache: Tensor) -> Tensor:
        norms = self.new_scores()
        ops.vector_norms(cache, self.block_table, self.num_entries, norms)
        return norms


def slices(layers: range, num_rows: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Layers and rows, so many pairs at a time.

    Several layers where there are few rows: a GPU would wait for launches, one by one.

    Args:
        layers: Consecutive ones.
        at_once: Pairs of a layer and a row, at least 1.
    """
    of_rows = max(1, min(at_once, num_rows))
    of_layers = at_once // of_rows
    for layer, row in product(layers[::of_layers], range(0, num_rows, of_rows)):
        yield (
            slice(layer, min(layer + of_layers, layers.stop)),
            slice(row, min(row + of_rows, num_rows)),
        )


def _key_of_one(queries: Tensor, scale: float) -> Tensor:
    """The key along the mean query whose logits are closest to 1, in the mean square.

    Args:
        queries: [..., num_queries, head_size], float32; those that are 0 do not count.

    Returns:
        [..., head_size]; 0 where no query is.
    """
    direction = normalize(queries.sum(-2), dim=-1)
    logits = (queries @ direction[..., None]).squeeze(-1) * scale
    length = logits.sum(-1) / logits.square().sum(-1).clamp(min=_EPS)
    return direction * length[..., None]
