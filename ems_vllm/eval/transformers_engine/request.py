# SPDX-License-Identifier: Apache-2.0
"""One request on a DynamicCache whose compressed layers hold live entries only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.transformers_engine.attention import masked_by, observed_by
from ems_vllm.eval.transformers_engine.cache import entries_of, fork
from ems_vllm.eval.transformers_engine.compaction import CompactionSettings
from ems_vllm.eval.transformers_engine.heads import CompressedHeads
from ems_vllm.eval.transformers_engine.level import CompressedLevel
from ems_vllm.eval.transformers_engine.plans import (
    LevelPlan,
    first_scored_query,
    next_compaction,
    scored_queries,
)
from ems_vllm.eval.transformers_engine.scored_queries import received_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ems_vllm.eval.transformers_engine.prefill import Prefilled
    from ems_vllm.eval.transformers_engine.quantised import CacheFormat


class CompressedRequest:
    """Goes on after a prompt, compressing each level of layers whenever its plan says so.

    Args:
        model: Loaded with attention.IMPLEMENTATION.
        settings: How it is compressed.
        levels: Of all compressed layers, each with its plan.
        prompt: The processed prompt; not changed. Where plans compact within the prompt, as much of
            it as comes before that; the rest is for `extend`.
        cache_format: How entries are stored. What a compaction merges is what is read of them, and
            the result is stored again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: CompactionSettings,
        levels: Sequence[LevelPlan],
        prompt: Prefilled,
        cache_format: CacheFormat,
    ) -> None:
        self._model = model
        self._obs_window = settings.obs_window
        self._num_processed = prompt.num_tokens
        self._plans = list(levels)
        self._scale = settings.scale
        self._prompt_len = levels[0].plan.prompt_len
        self._accumulates = settings.policy.scorer.uses_accumulated
        self._sample_stride = settings.sample_stride
        self._queries = prompt.queries
        self._new_queries: dict[int, torch.Tensor] = {}
        self._layers = prompt.layers
        self._cache = fork(prompt.cache, cache_format)
        # The same scores for all levels, as the scheduler has it.
        scored = scored_queries(levels, self._sample_stride)
        by_head = settings.policy.allocator.deals_to_heads
        kind = CompressedHeads if by_head else CompressedLevel
        self._levels = [kind(settings, level, prompt, scored) for level in levels]

    @property
    def num_live(self) -> float:
        """Entries per kv_head that a compressed layer holds, mean over these layers."""
        held = sum(
            len(level.layers) * level.num_live(self._num_processed) for level in self._levels
        )
        return held / len(self._layers)

    def next_compaction(self) -> int | None:
        """Tokens processed when the next compaction of any level falls due; None for never."""
        return next_compaction(self._plans, self._num_processed)

    def step(self, token_id: int) -> torch.Tensor:
        """Logits after one more token, [vocabulary], compressing first where it is due."""
        return self.extend([token_id])[0]

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after each of some more tokens, as if they were taken one after the other.

        One forward pass for all of them, or one from compaction to compaction of any level.

        Args:
            token_ids: At least one.

        Returns:
            [num_tokens, vocabulary].
        """
        logits = []
        start = 0
        while start < len(token_ids):
            self.compress()
            due = self.next_compaction()
            stop = len(token_ids) if due is None else start + due - self._num_processed
            logits.append(self._forward(token_ids[start:stop]))
            start = stop
        return torch.cat(logits)

    @torch.inference_mode()
    def compress(self) -> None:
        """Compress where it is due; `extend` does it by itself, before the first of its tokens."""
        for level in self._levels:
            level.compress(self._cache, self._queries, self._num_processed)

    @torch.inference_mode()
    def entries(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Live keys and values of the compressed layers; not to be changed.

        Returns:
            By layer, [num_kv_heads, num_live, head_size]; layers of other levels may hold another
            number of entries, and heads may have `gaps`.
        """
        return entries_of(self._cache, self._layers)

    def gaps(self) -> dict[int, torch.Tensor]:
        """By layer whose kv_heads hold different numbers of entries, [num_kv_heads]: the leading
        places that hold none."""
        found = {layer: level.gaps(layer) for level in self._levels for layer in level.layers}
        return {layer: gaps for layer, gaps in found.items() if gaps is not None}

    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        device = self._model.device
        end = self._num_processed + len(token_ids)
        with observed_by(self._observe), masked_by(self.gaps()):
            logits: torch.Tensor = self._model(
                torch.tensor([token_ids], device=device),
                past_key_values=self._cache,
                # The true positions: keys were rotated before they were compressed.
                position_ids=torch.arange(self._num_processed, end, device=device)[None],
            ).logits
        new = torch.stack([self._new_queries[layer] for layer in self._layers])
        self._queries = torch.cat([self._queries, new], dim=1)[:, -self._obs_window :]
        self._num_processed = end
        return logits[0]

    def _observe(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        self._new_queries[layer] = queries
        if not self._accumulates or self._num_processed >= self._prompt_len:
            return
        first = first_scored_query(self._plans, self._num_processed)
        for level in self._levels:
            if first is not None and layer in level.layers and level.plan.compresses_prompt:
                scored = queries[max(0, first - self._num_processed) :]
                received = received_attention(scored, keys, self._scale, self._sample_stride)
                level.accumulate(layer, self._num_processed, received)
