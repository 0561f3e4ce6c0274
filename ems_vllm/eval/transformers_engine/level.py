# SPDX-License-Identifier: Apache-2.0
"""The compressed layers of one level of a request: all hold equally many entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.transformers_engine.cache import read_entries, replace_entries
from ems_vllm.eval.transformers_engine.paging import from_pages, to_pages
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.cache import StoredCache
    from ems_vllm.eval.transformers_engine.plans import LevelPlan
    from ems_vllm.eval.transformers_engine.prefill import Prefilled
    from ems_vllm.policies.rotation import Rotation
    from ems_vllm.spans import Span


@dataclass(frozen=True)
class CompactionSettings:
    """How the levels of a request are compacted.

    Attributes:
        policy: Which entries stay.
        obs_window: Last queries that score.
        scale: Softmax scale of the model.
        rotation: RoPE of the compressed layers; None for none.
        protected: Spans of positions that stay as they are, in order and apart.
    """

    policy: Policy
    obs_window: int
    scale: float
    rotation: Rotation | None = None
    protected: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Counts:
    """Entries of the rows of a compaction; see CompactionContext.

    Attributes:
        num_live, num_entries, num_scored, num_kept: Of each row.
        num_queries: Recorded ones.
        target_column: Where what is kept goes, in the table of every row.
        rows_together: Consecutive rows that are kv_heads of a request.
    """

    num_live: Sequence[int]
    num_entries: Sequence[int]
    num_scored: Sequence[int]
    num_kept: Sequence[int]
    num_queries: int
    target_column: int
    rows_together: int = 1


class CompressedLevel:
    """Compacts the layers of a level whenever their plan says so.

    Args:
        settings: How.
        level: Which layers, and when.
        prompt: The processed prompt; not changed.
        first_query: Position of the first of its queries that scored, for all levels; None where
            none did.

    Attributes:
        layers, plan: Of the level.
    """

    def __init__(
        self,
        settings: CompactionSettings,
        level: LevelPlan,
        prompt: Prefilled,
        first_query: int | None,
    ) -> None:
        self.layers, self.plan = level.layers, level.plan
        self._settings = settings
        # Of its layers among the compressed ones: queries and scores are of all of these.
        self._places = [prompt.layers.index(layer) for layer in level.layers]
        self._num_heads = prompt.num_kv_heads
        self._first = self._tail = 0
        # Tokens whose queries have been accumulated, by the prompt or by a compaction.
        self._num_accumulated = prompt.num_tokens if self.plan.compresses_prompt else 0
        # Scores of the leading entries; the others have none yet.
        self._scores: torch.Tensor | None = None
        if settings.policy.scorer.uses_global:
            self._scores = self._prompt_scores(prompt, first_query)
        # Where the forward pass began whose attention was added last.
        self._scored_from: int | None = None
        # By layer and head, the position of every kept entry, where some are protected.
        self._positions: dict[tuple[int, int], torch.Tensor] = {}

    def num_live(self, num_processed: int) -> int:
        """Entries per kv_head that each layer holds of so many tokens."""
        return num_processed - self._first * self.plan.block_size

    def gaps(self, layer: int) -> torch.Tensor | None:
        """[num_kv_heads]: leading places of a layer's heads that hold no entry; None for none."""
        return None

    def compress(self, cache: StoredCache, queries: torch.Tensor, num_processed: int) -> None:
        """Compact the level where it is due.

        Args:
            cache: Of the request; changed.
            queries: [num_compressed_layers, num_queries, num_heads, head_size] - of the last
                tokens, of all compressed layers.
            num_processed: Tokens that the request has processed.
        """
        first, tail = self.plan.columns(num_processed)
        if first > self._first:
            if self._is_of_prompt(num_processed):
                self._num_accumulated = num_processed
            self._compact(cache, queries, num_processed, first, tail)
            self._first, self._tail = first, tail
            self._num_accumulated = num_processed

    def accumulate(self, layer: int, start: int, received: torch.Tensor) -> None:
        """Add what a layer's entries received from queries within the prompt.

        They are those before the next compaction; with a limited number of them, nothing that was
        carried from earlier ones is added to.

        Args:
            layer: Index of one of the level's layers.
            start: Position of the first token of the forward pass that the queries are of.
            received: [num_kv_heads, num_live], float32.
        """
        assert self._scores is not None
        if start != self._scored_from:
            # The first layer of this forward pass.
            carried = self._scores
            self._scores = received.new_zeros((*carried.shape[:2], received.shape[1]))
            if self.plan.global_queries is None:
                self._scores[:, :, : carried.shape[2]] = carried
            self._scored_from = start
        self._scores[self.layers.index(layer)] += received

    def _is_of_prompt(self, num_processed: int) -> bool:
        return self.plan.compresses_prompt and num_processed <= self.plan.prompt_len

    def _prompt_scores(self, prompt: Prefilled, first_query: int | None) -> torch.Tensor:
        """Accumulated scores to begin with, [num_layers, num_kv_heads, num_scored]."""
        if self.plan.compresses_prompt:
            assert first_query is not None
            return prompt.scores[first_query][self._places]
        shape = (len(self.layers), prompt.num_kv_heads, 0)
        return torch.zeros(shape, device=prompt.queries.device)

    def _compact(
        self,
        cache: StoredCache,
        queries: torch.Tensor,
        num_processed: int,
        first: int,
        tail: int,
    ) -> None:
        """Replace entries [self._first, tail), in columns, by ones that fill [first, tail)."""
        block_size = self.plan.block_size
        entries = read_entries(cache, self.layers)
        keys, values = (to_pages(tensor, block_size) for tensor in entries)
        context = self._context(first, tail, keys, values, queries[self._places], num_processed)
        held = [self.held_positions(layer, tail) for layer in range(len(self.layers))]
        kept_idx = self._settings.policy.compact(self._protecting(context, held))
        if self._settings.protected:
            for layer, of_heads in enumerate(held):
                self._take_positions(layer, of_heads, kept_idx[layer, 0])
        start, stop = (first - self._first) * block_size, self.num_live(num_processed)
        kept = (from_pages(pages, start, stop) for pages in (keys, values))
        replace_entries(cache, self.layers, *kept)
        if context.paged_scores is not None:
            if num_processed >= self.plan.prompt_len:
                # Of what comes behind, the next compaction sees recorded queries alone.
                stop = (tail - self._first) * block_size
            self._scores = from_pages(context.paged_scores, start, stop)

    def _context(
        self,
        first: int,
        tail: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor,
        num_processed: int,
    ) -> CompactionContext:
        block_size, num_live = self.plan.block_size, self.num_live(num_processed)
        num_entries = (tail - self._first) * block_size
        scores = self._scores
        return self._context_of(
            keys,
            values,
            torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)[None],
            ring(
                queries[:, -self._settings.obs_window :], self._settings.obs_window, num_processed
            ),
            Counts(
                num_live=[num_live],
                num_entries=[num_entries],
                num_scored=[0 if scores is None else min(scores.shape[2], num_entries)],
                num_kept=[(tail - first) * block_size],
                num_queries=min(queries.shape[1], self._settings.obs_window),
                target_column=first - self._first,
            ),
            self._paged_scores(num_live),
            num_processed,
        )

    def _context_of(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        ring: torch.Tensor,
        counts: Counts,
        paged_scores: torch.Tensor | None,
        num_processed: int,
    ) -> CompactionContext:
        """What the policy sees of rows that are compacted after so many tokens.

        Args:
            keys, values: [num_layers, num_pages, num_kv_heads, block_size, head_size].
            table: [num_rows, num_columns], int32.
            ring: [num_layers, num_rows, obs_window, num_heads, head_size].
            counts: Of the rows.
            paged_scores: [num_layers, num_pages, num_kv_heads, block_size], or None.
        """
        settings, num_rows = self._settings, len(table)
        num_sinks = settings.policy.selector.num_sink_tokens

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=keys.device)

        return CompactionContext(
            key_cache=keys,
            value_cache=values,
            block_table=table,
            num_entries=ints(counts.num_entries),
            num_live=ints(counts.num_live),
            num_scored=ints(counts.num_scored),
            budgets=ints(counts.num_kept),
            num_protected=ints([min(num_sinks, kept) for kept in counts.num_kept]),
            target_columns=ints([counts.target_column] * num_rows),
            num_represented=ints([num_processed - self._num_accumulated] * num_rows),
            max_entries=max(counts.num_entries),
            max_budget=max(counts.num_kept),
            scale=settings.scale,
            paged_scores=paged_scores,
            score_table=table,
            query_ring=ring,
            ring_rows=ints(range(num_rows)),
            num_queries=ints([counts.num_queries] * num_rows),
            end_positions=ints([num_processed] * num_rows),
            is_untouched=ints([self._first == 0] * num_rows).bool(),
            rotations=[settings.rotation] * keys.shape[0],
            rows_together=counts.rows_together,
        )

    def held_positions(self, layer: int, tail: int) -> list[torch.Tensor]:
        """By head, the position of every entry that a compaction of columns up to `tail` sees.

        Nothing where nothing is protected.

        Args:
            layer: Index in the level.
        """
        if not self._settings.protected:
            return []
        size = self.plan.block_size
        new = torch.arange(self._tail * size, tail * size)
        none = new[:0]
        return [
            torch.cat([self._positions.get((layer, head), none), new])
            for head in range(self._num_heads)
        ]

    def _take_positions(
        self, layer: int, held: Sequence[torch.Tensor], kept_idx: torch.Tensor
    ) -> None:
        """Remember which entries a layer keeps.

        Args:
            held: Of held_positions.
            kept_idx: [num_kv_heads, most entries of a head]; see Selection.
        """
        for head, (of_head, kept) in enumerate(zip(held, kept_idx.cpu(), strict=True)):
            self._positions[layer, head] = of_head[kept[kept >= 0].long()]

    def _protecting(
        self, context: CompactionContext, held: Sequence[Sequence[torch.Tensor]]
    ) -> CompactionContext:
        """A context that protects what the request does.

        Args:
            held: By layer, of held_positions.
        """
        if not self._settings.protected:
            return context
        mask = torch.zeros((len(held), len(held[0]), context.max_entries), dtype=torch.bool)
        for of_layer, in_layer in zip(mask, held, strict=True):
            for row, positions in zip(of_layer, in_layer, strict=True):
                for start, stop in self._settings.protected:
                    row[: len(positions)] |= (positions >= start) & (positions < stop)
        # Heads are heads of one row, or rows.
        shape = (len(held), context.num_rows, context.num_kv_heads, context.max_entries)
        return replace(context, is_protected=mask.view(shape).to(context.device))

    def _paged_scores(self, num_live: int) -> torch.Tensor | None:
        if self._scores is None:
            return None
        scores = self._scores.new_zeros((*self._scores.shape[:2], num_live))
        scores[:, :, : self._scores.shape[2]] = self._scores
        return to_pages(scores, self.plan.block_size)


def ring(queries: torch.Tensor, obs_window: int, end_position: int) -> torch.Tensor:
    """The last queries where ops.score_window looks for them.

    Args:
        queries: [num_layers, num_queries, num_heads, head_size], the newest last.
        obs_window: Size of the ring.
        end_position: One more than the position of the newest.

    Returns:
        [num_layers, 1, obs_window, num_heads, head_size].
    """
    num_layers, num_queries, *rest = queries.shape
    ring = queries.new_zeros((num_layers, 1, obs_window, *rest))
    positions = torch.arange(end_position - num_queries, end_position, device=queries.device)
    ring[:, 0, positions % obs_window] = queries
    return ring
