# SPDX-License-Identifier: Apache-2.0
"""The compressed layers of one level of a request: all hold equally many entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.transformers_engine.cache import read_entries, replace_entries
from ems_vllm.eval.transformers_engine.compaction import (
    CompactionSettings,
    Counts,
    compaction_context,
    keeping,
    ring,
)
from ems_vllm.eval.transformers_engine.paging import from_pages, to_pages
from ems_vllm.eval.transformers_engine.protection import ProtectedPositions

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.cache import StoredCache
    from ems_vllm.eval.transformers_engine.plans import LevelPlan
    from ems_vllm.eval.transformers_engine.prefill import Prefilled
    from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries
    from ems_vllm.policies.base import Scores
    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.coverage import Coverage


class CompressedLevel:
    """Compacts the layers of a level whenever their plan says so.

    Args:
        settings: How.
        level: Which layers, and when.
        prompt: The processed prompt; not changed.
        scored: Its queries that scored, for all levels; None where none did.

    Attributes:
        layers, plan: Of the level.
    """

    def __init__(
        self,
        settings: CompactionSettings,
        level: LevelPlan,
        prompt: Prefilled,
        scored: ScoredQueries | None,
    ) -> None:
        self.layers, self.plan = level.layers, level.plan
        self._settings = settings
        # Of its layers among the compressed ones: queries and scores are of all of these.
        self._places = [prompt.layers.index(layer) for layer in level.layers]
        # As they are; a coverage may keep less than is planned.
        self._first = self._tail = self._planned_first = 0
        # Tokens whose queries have been accumulated, by the prompt or by a compaction.
        self._num_accumulated = prompt.num_tokens if self.plan.compresses_prompt else 0
        # Scores of the leading entries; the others have none yet.
        self._scores: torch.Tensor | None = None
        if settings.policy.scorer.uses_accumulated:
            self._scores = self._prompt_scores(prompt, scored)
        # Where the forward pass began whose attention was added last.
        self._scored_from: int | None = None
        self._protected = ProtectedPositions(settings.protected, prompt.num_kv_heads)

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
        planned_first, tail = self.plan.columns(num_processed)
        if planned_first > self._planned_first:
            if self._is_of_prompt(num_processed):
                self._num_accumulated = num_processed
            # What is held may be less than what may stay.
            first = max(planned_first, self._first)
            self._first = self._compact(cache, queries, num_processed, first, tail)
            self._planned_first, self._tail = planned_first, tail
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

    def _prompt_scores(self, prompt: Prefilled, scored: ScoredQueries | None) -> torch.Tensor:
        """Accumulated scores to begin with, [num_layers, num_kv_heads, num_scored]."""
        if self.plan.compresses_prompt:
            assert scored is not None
            return prompt.scores[scored][self._places]
        shape = (len(self.layers), prompt.num_kv_heads, 0)
        return torch.zeros(shape, device=prompt.queries.device)

    def _compact(
        self,
        cache: StoredCache,
        queries: torch.Tensor,
        num_processed: int,
        first: int,
        tail: int,
    ) -> int:
        """Replace entries [self._first, tail), in columns, by ones that fill [first, tail).

        Returns:
            The first column of what was kept: `first`, or a later one where a coverage decides.
        """
        block_size = self.plan.block_size
        entries = read_entries(cache, self.layers)
        keys, values = (to_pages(tensor, block_size) for tensor in entries)
        context = self._context(first, tail, keys, values, queries[self._places], num_processed)
        held = [self._held(layer, tail) for layer in range(len(self.layers))]
        context = self._protected.protect(context, held)
        policy = self._settings.policy
        if policy.coverage is None:
            kept_idx = policy.compact(context)
        else:
            scores = policy.score(context)
            num_kept = self._num_covered(policy.coverage, context, scores)
            context = keeping(context, self._settings, num_kept, tail - self._first)
            kept_idx = policy.place(context, scores)
            first = tail - num_kept
        if self._settings.protected:
            for layer, of_heads in enumerate(held):
                self._protected.keep(layer, of_heads, kept_idx[layer, 0])
        start, stop = (first - self._first) * block_size, self.num_live(num_processed)
        kept = (from_pages(pages, start, stop) for pages in (keys, values))
        replace_entries(cache, self.layers, *kept)
        if context.accumulated_pages is not None:
            if num_processed >= self.plan.prompt_len:
                # Of what comes behind, the next compaction sees recorded queries alone.
                stop = (tail - self._first) * block_size
            self._scores = from_pages(context.accumulated_pages, start, stop)
        return first

    def _num_covered(self, coverage: Coverage, context: CompactionContext, scores: Scores) -> int:
        """Blocks that a coverage keeps."""
        (held,) = self._settings.policy.held_shares(context, scores).tolist()
        num_heads = context.num_layers * context.num_kv_heads
        reserved = int(context.num_reserved.max())
        before = self._tail - self._first
        return coverage.num_blocks(held, num_heads, self.plan.block_size, reserved, before)

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
        window = self._settings.obs_window
        counts = Counts(
            num_live=[num_live],
            num_entries=[num_entries],
            num_scored=[0 if scores is None else min(scores.shape[2], num_entries)],
            num_kept=[(tail - first) * block_size],
            num_queries=min(queries.shape[1], window),
            num_processed=num_processed,
            num_represented=num_processed - self._num_accumulated,
            target_column=first - self._first,
            is_untouched=self._first == 0,
        )
        table = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)[None]
        recorded = ring(queries[:, -window:], window, num_processed)
        accumulated_pages = self._accumulated_pages(num_live)
        return compaction_context(
            self._settings, counts, keys, values, table, recorded, accumulated_pages, self.layers
        )

    def _held(self, layer: int, tail: int) -> list[torch.Tensor]:
        """By head, positions of what a compaction of columns up to `tail` sees in a layer."""
        size = self.plan.block_size
        return self._protected.held(layer, self._tail * size, tail * size)

    def _accumulated_pages(self, num_live: int) -> torch.Tensor | None:
        if self._scores is None:
            return None
        scores = self._scores.new_zeros((*self._scores.shape[:2], num_live))
        scores[:, :, : self._scores.shape[2]] = self._scores
        return to_pages(scores, self.plan.block_size)
