# SPDX-License-Identifier: Apache-2.0
"""One request on a DynamicCache whose compressed layers hold live entries only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.reference.attention import observed_by
from ems_vllm.eval.reference.cache import fork, read_entries, replace_entries
from ems_vllm.eval.reference.paging import from_pages, to_pages
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ems_vllm._C import CompressionPlan
    from ems_vllm.eval.reference.prefill import Prefilled
    from ems_vllm.eval.reference.quantised import CacheFormat
    from ems_vllm.policies.rotation import Rotation


@dataclass(frozen=True)
class RequestSettings:
    """How a request is compressed.

    Attributes:
        plan: When, and into which columns.
        policy: Which entries stay.
        obs_window: Last queries that score.
        scale: Softmax scale of the model.
        rotation: RoPE of the compressed layers; None for none.
    """

    plan: CompressionPlan
    policy: Policy
    obs_window: int
    scale: float
    rotation: Rotation | None = None


class ReferenceRequest:
    """Decodes after a prompt, compressing whenever the plan says so.

    Args:
        model: Loaded with attention.IMPLEMENTATION.
        settings: How it is compressed.
        prompt: The processed prompt; not changed.
        cache_format: How entries are stored. What a compaction merges is what is read of them, and
            the result is stored again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: RequestSettings,
        prompt: Prefilled,
        cache_format: CacheFormat,
    ) -> None:
        self._model = model
        self._settings = settings
        self._num_processed = prompt.num_tokens
        self._first = 0
        # Tokens whose queries have been accumulated, by the prompt or by a compaction.
        self._num_accumulated = prompt.num_tokens if settings.plan.compresses_prompt else 0
        self._queries = prompt.queries
        self._new_queries: dict[int, torch.Tensor] = {}
        # Scores of the leading entries; the others have none yet.
        self._scores: torch.Tensor | None = None
        if settings.policy.scorer.uses_global:
            self._scores = _prompt_scores(settings.plan, prompt)
        self._layers = prompt.layers
        self._cache = fork(prompt.cache, cache_format)

    @property
    def num_live(self) -> int:
        """Entries per kv_head that a compressed layer holds."""
        return self._num_processed - self._first * self._settings.plan.block_size

    def step(self, token_id: int) -> torch.Tensor:
        """Logits after one more token, [vocabulary], compressing first where it is due."""
        return self.extend([token_id])[0]

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after each of some more tokens, as if they were taken one after the other.

        One forward pass for all of them, or one from compaction to compaction.

        Args:
            token_ids: At least one.

        Returns:
            [num_tokens, vocabulary].
        """
        plan = self._settings.plan
        logits = []
        start = 0
        while start < len(token_ids):
            self.compress()
            due = plan.next_compaction(self._num_processed)
            stop = len(token_ids) if due is None else start + due - self._num_processed
            logits.append(self._forward(token_ids[start:stop]))
            start = stop
        return torch.cat(logits)

    @torch.inference_mode()
    def compress(self) -> None:
        """Compress where it is due; `extend` does it by itself, before the first of its tokens."""
        first, tail = self._settings.plan.columns(self._num_processed)
        if first > self._first:
            self._compact(first, tail)

    @torch.inference_mode()
    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Live keys and values of the compressed layers; a copy.

        Returns:
            Two of [num_layers, num_kv_heads, num_live, head_size].
        """
        return read_entries(self._cache, self._layers)

    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        device = self._model.device
        end = self._num_processed + len(token_ids)
        with observed_by(self._observe):
            logits: torch.Tensor = self._model(
                torch.tensor([token_ids], device=device),
                past_key_values=self._cache,
                # The true positions: keys were rotated before they were compressed.
                position_ids=torch.arange(self._num_processed, end, device=device)[None],
            ).logits
        new = torch.stack([self._new_queries[layer] for layer in self._layers])
        self._queries = torch.cat([self._queries, new], dim=1)[:, -self._settings.obs_window :]
        self._num_processed = end
        return logits[0]

    def _observe(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        self._new_queries[layer] = queries

    def _compact(self, first: int, tail: int) -> None:
        """Replace entries [self._first, tail), in columns, by ones that fill [first, tail)."""
        block_size = self._settings.plan.block_size
        entries = read_entries(self._cache, self._layers)
        keys, values = (to_pages(tensor, block_size) for tensor in entries)
        context = self._context(first, tail, keys, values)
        self._settings.policy.compact(context)
        start, stop = (first - self._first) * block_size, self.num_live
        kept = (from_pages(pages, start, stop) for pages in (keys, values))
        replace_entries(self._cache, self._layers, *kept)
        if context.paged_scores is not None:
            num_kept = (tail - first) * block_size
            self._scores = from_pages(context.paged_scores, start, start + num_kept)
        self._first = first
        self._num_accumulated = self._num_processed

    def _context(
        self, first: int, tail: int, keys: torch.Tensor, values: torch.Tensor
    ) -> CompactionContext:
        settings, block_size = self._settings, self._settings.plan.block_size
        device = keys.device
        num_entries = (tail - self._first) * block_size
        num_kept = (tail - first) * block_size
        table = torch.arange(keys.shape[1], dtype=torch.int32, device=device)[None]

        def row(value: int) -> torch.Tensor:
            return torch.tensor([value], dtype=torch.int32, device=device)

        num_sinks = min(settings.policy.selector.num_sink_tokens, num_kept)
        num_scored = 0 if self._scores is None else min(self._scores.shape[2], num_entries)
        queries = self._queries[:, -settings.obs_window :]
        return CompactionContext(
            key_cache=keys,
            value_cache=values,
            block_table=table,
            num_entries=row(num_entries),
            num_live=row(self.num_live),
            num_scored=row(num_scored),
            budgets=row(num_kept),
            num_protected=row(num_sinks),
            target_columns=row(first - self._first),
            num_represented=row(self._num_processed - self._num_accumulated),
            max_entries=num_entries,
            max_budget=num_kept,
            scale=settings.scale,
            paged_scores=self._paged_scores(),
            score_table=table,
            query_ring=_ring(queries, settings.obs_window, self._num_processed),
            ring_rows=row(0),
            num_queries=row(queries.shape[1]),
            end_positions=row(self._num_processed),
            is_untouched=row(self._first == 0).bool(),
            rotations=[settings.rotation] * len(self._layers),
        )

    def _paged_scores(self) -> torch.Tensor | None:
        if self._scores is None:
            return None
        scores = self._scores.new_zeros((*self._scores.shape[:2], self.num_live))
        scores[:, :, : self._scores.shape[2]] = self._scores
        return to_pages(scores, self._settings.plan.block_size)


def _prompt_scores(plan: CompressionPlan, prompt: Prefilled) -> torch.Tensor:
    """Accumulated scores that a request begins with, [num_layers, num_kv_heads, num_scored]."""
    if plan.compresses_prompt:
        return prompt.scores[plan.first_scored_query]
    return torch.zeros((len(prompt.queries), prompt.num_kv_heads, 0), device=prompt.queries.device)


def _ring(queries: torch.Tensor, obs_window: int, end_position: int) -> torch.Tensor:
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
