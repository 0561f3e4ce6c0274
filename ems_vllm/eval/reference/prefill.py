# SPDX-License-Identifier: Apache-2.0
"""A prompt, processed by transformers, with what scorers want to know of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from ems_vllm.eval.reference.attention import observed_by
from ems_vllm.eval.reference.cache import from_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a forward pass; bounds the attention matrices of the scores.
_CHUNK = 256


@dataclass(frozen=True)
class Prefilled:
    """A processed prompt; any number of requests may go on from it.

    Attributes:
        num_tokens: Its length.
        logits: [vocabulary] - after its last token.
        keys, values: [num_layers, num_kv_heads, num_tokens, head_size]; keys after RoPE.
        queries: [num_layers, num_queries, num_heads, head_size] - of the last tokens.
        scores: By position of the first query that counts: [num_layers, num_kv_heads, num_tokens],
            float32 - attention that every token received from that token and all after it,
            averaged over the query heads of a kv_head.
    """

    num_tokens: int
    logits: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    scores: Mapping[int, torch.Tensor]


class PromptObserver:
    """Collects the last queries and the accumulated attention of a prompt.

    Args:
        num_layers: Of the model.
        num_tokens: Of the prompt.
        num_queries: Last queries to keep.
        scale: Softmax scale.
        first_queries: Positions from which on queries count; scores are kept for each.
    """

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        num_queries: int,
        scale: float,
        first_queries: Collection[int],
    ) -> None:
        self._num_tokens, self._num_queries, self._scale = num_tokens, num_queries, scale
        self.queries: list[torch.Tensor | None] = [None] * num_layers
        self.scores: dict[int, dict[int, torch.Tensor]] = {first: {} for first in first_queries}

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """See attention.Observer."""
        last = self.queries[layer]
        joined = queries if last is None else torch.cat([last, queries])
        self.queries[layer] = joined[-self._num_queries :].clone()
        num_seen = keys.shape[1]
        for first, scores_by_layer in self.scores.items():
            scores = scores_by_layer.get(layer)
            if scores is None:
                scores = keys.new_zeros((keys.shape[0], self._num_tokens), dtype=torch.float32)
                scores_by_layer[layer] = scores
            counted = queries[max(0, first - num_seen + len(queries)) :]
            if len(counted):
                scores[:, :num_seen] += received_attention(counted, keys, self._scale)


def received_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Column sums of the causal attention matrix, averaged over the query heads of a kv_head.

    Paper: EMS, 2024, arXiv:2412.08521 (global score); the definition, without any sampling.

    Args:
        queries: [num_queries, num_heads, head_size] - of the last positions.
        keys: [num_kv_heads, num_entries, head_size].
        scale: Factor on the dot products.

    Returns:
        [num_kv_heads, num_entries], float32.
    """
    num_kv_heads, num_entries, _ = keys.shape
    grouped = queries.transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    logits = scale * (grouped.float() @ keys.float().transpose(1, 2)[:, None])
    num_queries = len(queries)
    visible = torch.ones(num_queries, num_entries, dtype=torch.bool, device=keys.device)
    visible = visible.tril(num_entries - num_queries)
    attention = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return attention.mean(dim=1).sum(dim=1)


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    num_queries: int,
    scale: float,
    first_queries: Collection[int] = (0,),
) -> Prefilled:
    """Process a prompt.

    Args:
        model: Loaded with attention.IMPLEMENTATION.
        token_ids: The prompt.
        num_queries: Last queries to keep, the largest obs_window of what follows.
        scale: Softmax scale.
        first_queries: Positions of the first query that scores, of all plans that go on from here.
    """
    num_layers = model.config.num_hidden_layers
    observer = PromptObserver(num_layers, len(token_ids), num_queries, scale, first_queries)
    cache = DynamicCache()
    with observed_by(observer):
        for start in range(0, len(token_ids), _CHUNK):
            chunk = torch.tensor([token_ids[start : start + _CHUNK]], device=model.device)
            logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
    keys, values = from_cache(cache)
    return Prefilled(
        num_tokens=len(token_ids),
        logits=logits[0, -1],
        keys=keys,
        values=values,
        queries=torch.stack([queries for queries in observer.queries if queries is not None]),
        scores={
            first: torch.stack([by_layer[layer] for layer in sorted(by_layer)])
            for first, by_layer in observer.scores.items()
        },
    )
