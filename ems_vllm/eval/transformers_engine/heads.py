# SPDX-License-Identifier: Apache-2.0
"""The compressed layers of a level whose kv_heads hold different numbers of entries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ems_vllm.eval.transformers_engine.cache import replace_entries
from ems_vllm.eval.transformers_engine.compaction import (
    CompactionSettings,
    Counts,
    compaction_context,
    ring,
)
from ems_vllm.eval.transformers_engine.level import CompressedLevel
from ems_vllm.eval.transformers_engine.paging import to_pages
from ems_vllm.plan import prompt_blocks
from ems_vllm.spans import num_covered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ems_vllm.eval.transformers_engine.cache import StoredCache
    from ems_vllm.eval.transformers_engine.plans import LevelPlan
    from ems_vllm.eval.transformers_engine.prefill import Prefilled
    from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries


class CompressedHeads(CompressedLevel):
    """Compacts each kv_head of a layer into as many pages as it is dealt.

    A cache layer is as wide as its longest head; the others have gaps in front, so that the newest
    entries of all are the last ones (see attention.masked_by). Every head is a row of its own to
    the policy, in pages of its own.

    Args: See CompressedLevel; the allocator deals to heads.
    """

    def __init__(
        self,
        settings: CompactionSettings,
        level: LevelPlan,
        prompt: Prefilled,
        scored: ScoredQueries | None,
    ) -> None:
        super().__init__(settings, level, prompt, scored)
        self._shares = level.heads
        # By layer and head; those of the kept entries once there are any.
        self._of_heads = None if self._scores is None else [list(one) for one in self._scores]
        self._gaps: dict[int, torch.Tensor] = {}

    def gaps(self, layer: int) -> torch.Tensor | None:
        return self._gaps.get(layer)

    def _compact(
        self,
        cache: StoredCache,
        queries: torch.Tensor,
        num_processed: int,
        first: int,
        tail: int,
    ) -> int:
        for at, layer in enumerate(self.layers):
            self._compact_layer(cache, at, layer, queries[self._places[at]], num_processed, tail)
        return first

    def _compact_layer(
        self,
        cache: StoredCache,
        at: int,
        layer: int,
        queries: torch.Tensor,
        num_processed: int,
        tail: int,
    ) -> None:
        """Compact the layer with index `at` in its level.

        Args:
            queries: [num_queries, num_heads, head_size].
        """
        block_size = self.plan.block_size
        stored: Any = cache.layers[layer]
        gaps = self._gaps.get(layer)
        starts = [0] * stored.keys.shape[1] if gaps is None else gaps.tolist()
        keys, values = (_from_gaps(tensor[0], starts) for tensor in (stored.keys, stored.values))
        num_live = [len(of_head) for of_head in keys]
        num_new = num_processed - tail * block_size
        num_entries = [count - num_new for count in num_live]
        policy, num_rows = self._settings.policy, len(keys)
        budget = self.plan.budget_blocks * block_size
        # Until there are scores to deal by, all keep as much.
        by_scores = policy.allocator.deals_by_scores
        pages = [self.plan.budget_blocks] * num_rows if by_scores else self._dealt(layer, tail)
        num_kept = [count * block_size for count in pages]
        longest, most = max(num_live), max(num_entries if by_scores else num_kept)
        scores = None if self._of_heads is None else self._of_heads[at]
        accumulated_pages = None
        if scores is not None:
            accumulated_pages, _ = _paged(scores, longest, most, block_size)
        key_pages, num_columns = _paged(keys, longest, most, block_size)
        value_pages, _ = _paged(values, longest, most, block_size)
        width = key_pages.shape[1] // num_rows
        table = torch.arange(num_rows * width, dtype=torch.int32, device=key_pages.device)
        window = self._settings.obs_window
        counts = Counts(
            num_live=num_live,
            num_entries=num_entries,
            num_scored=[0] * num_rows
            if scores is None
            else [min(len(one), end) for one, end in zip(scores, num_entries, strict=True)],
            num_kept=num_kept,
            num_queries=min(len(queries), window),
            num_processed=num_processed,
            num_represented=num_processed - self._num_accumulated,
            target_column=num_columns,
            is_untouched=self._first == 0,
            rows_together=num_rows,
        )
        recorded = _ring_of_heads(ring(queries[None, -window:], window, num_processed), num_rows)
        context = compaction_context(
            self._settings,
            counts,
            key_pages,
            value_pages,
            table.view(num_rows, width),
            recorded,
            accumulated_pages,
            [layer],
        )
        held = self._held(at, tail)
        context = self._protected.protect(context, [held])
        found = policy.score(context)
        if by_scores:
            (pages,) = policy.allocator.deal(context, found, [budget]).tolist()
            num_kept = [count * block_size for count in pages]
            budgets = torch.tensor(num_kept, dtype=torch.int32, device=context.device)
            context = replace(context, budgets=budgets, max_budget=max(num_kept))
        kept_idx = policy.place(context, found)
        if self._settings.protected:
            self._protected.keep(at, held, kept_idx[0, :, 0])
        most, start = max(num_kept), num_columns * block_size

        def kept(of_heads: torch.Tensor) -> list[torch.Tensor]:
            slots = of_heads[0].view(num_rows, width * block_size, *of_heads.shape[4:])
            return [one[start : start + count] for one, count in zip(slots, num_kept, strict=True)]

        self._gaps[layer] = torch.tensor([most - count for count in num_kept])
        filled = [
            _with_gaps(
                [
                    torch.cat([one, new[end:]])
                    for one, new, end in zip(kept(of_pages), old, num_entries, strict=True)
                ],
                most + num_new,
            )
            for of_pages, old in zip((key_pages, value_pages), (keys, values), strict=True)
        ]
        replace_entries(cache, [layer], *(one[None] for one in filled))
        if context.accumulated_pages is not None and self._of_heads is not None:
            self._of_heads[at] = [one.clone() for one in kept(context.accumulated_pages)]

    def _dealt(self, layer: int, tail: int) -> Sequence[int]:
        """Pages of each kv_head of a layer, after a compaction of columns up to `tail`."""
        plan, protected = self.plan, self._settings.protected
        num_blocks = prompt_blocks(plan.prompt_len, plan.recent_window, plan.block_size)
        least = 1
        if protected:
            num_sinks = self._settings.policy.selector.num_sink_tokens
            num_kept = num_covered([(0, num_sinks), *protected], tail * plan.block_size)
            least = max(1, -(-num_kept // plan.block_size))
        assert self._shares is not None
        return self._shares[layer].pages(plan.budget_blocks, num_blocks, least)


def _from_gaps(entries: torch.Tensor, gaps: Sequence[int]) -> list[torch.Tensor]:
    """By head, [num_live, head_size]: entries [num_kv_heads, width, head_size] behind its gap."""
    return [of_head[gap:] for of_head, gap in zip(entries, gaps, strict=True)]


def _with_gaps(entries: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """[num_kv_heads, width, head_size]: each head's entries at the end."""
    filled = entries[0].new_zeros((len(entries), width, *entries[0].shape[1:]))
    for row, of_head in zip(filled, entries, strict=True):
        row[width - len(of_head) :] = of_head
    return filled


def _paged(
    entries: Sequence[torch.Tensor], num_entries: int, num_kept: int, block_size: int
) -> tuple[torch.Tensor, int]:
    """Entries of each head in pages of its own, and behind them pages for what is kept.

    Args:
        entries: By head, [at most num_entries, ...].
        num_entries, num_kept: Of the longest head.

    Returns:
        [1, num_heads * columns, 1, block_size, ...], and how many columns hold entries.
    """
    num_columns = -(-num_entries // block_size)
    width = num_columns * block_size + num_kept
    rows = entries[0].new_zeros((len(entries), 1, width, *entries[0].shape[1:]))
    for row, of_head in zip(rows, entries, strict=True):
        row[0, : len(of_head)] = of_head
    return to_pages(rows, block_size).flatten(0, 1)[None], num_columns


def _ring_of_heads(of_layer: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[1, num_kv_heads, window, group, head_size] of [1, 1, window, num_heads, head_size]."""
    of_heads = of_layer[0, 0].unflatten(1, (num_kv_heads, -1))
    return of_heads.transpose(0, 1).contiguous()[None]
