# SPDX-License-Identifier: Apache-2.0
"""A prompt, processed by transformers, with what scorers want to know of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.cache import empty_cache
from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries, received_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ems_vllm.eval.transformers_engine.cache import StoredCache
    from ems_vllm.eval.transformers_engine.quantised import CacheFormat

# Tokens of a forward pass: enough for most prompts, so that attention can be torch's fast causal
# one; bounded, since behind the first chunk it takes a mask.
_CHUNK = 4096


@dataclass(frozen=True)
class Prefilled:
    """A processed prompt; any number of requests may go on from it.

    Attributes:
        layers: Indices of the layers that are compressed, num_layers of them.
        token_ids: Of the prompt.
        logits: [vocabulary] - after its last token.
        cache: Of all layers of the model, in the format in which the prompt was processed; keys
            after RoPE.
        queries: [num_layers, num_queries, num_heads, head_size] - of the last tokens.
        scores: By the queries that count: [num_layers, num_kv_heads, num_tokens], float32 -
            attention that every token received from them, averaged over the query heads of a
            kv_head.
    """

    layers: Sequence[int]
    token_ids: Sequence[int]
    logits: torch.Tensor
    cache: StoredCache
    queries: torch.Tensor
    scores: Mapping[ScoredQueries, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_kv_heads(self) -> int:
        layer: Any = self.cache.layers[self.layers[0]]
        return int(layer.keys.shape[1])


class PromptObserver:
    """Collects the last queries and the accumulated attention of a prompt.

    Args:
        layers: Indices of the layers that are observed.
        num_tokens: Of the prompt.
        num_queries: Last queries to keep.
        scale: Softmax scale.
        scored: Which queries count; scores are kept for each.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_tokens: int,
        num_queries: int,
        scale: float,
        scored: Collection[ScoredQueries],
    ) -> None:
        self.layers = layers
        self._num_tokens, self._num_queries, self._scale = num_tokens, num_queries, scale
        self._spans = _spans(scored, num_tokens)
        self._queries: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        # By layer: [num_spans, num_kv_heads, num_tokens], what was received from the queries of
        # each span.
        self._received: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """See attention.Observer."""
        if layer not in self._queries:
            return
        if self._num_queries > 0:
            self._queries[layer].append(queries[-self._num_queries :].clone())
        if layer not in self._received:
            shape = (len(self._spans), keys.shape[0], self._num_tokens)
            self._received[layer] = keys.new_zeros(shape, dtype=torch.float32)
        num_seen = keys.shape[1]
        num_before = num_seen - len(queries)
        for index, ((first, stride), end) in enumerate(self._spans.items()):
            start, stop = max(first, num_before), min(end, num_seen)
            if start < stop:
                counted = queries[start - num_before : stop - num_before]
                received = received_attention(counted, keys[:, :stop], self._scale, stride)
                self._received[layer][index, :, :stop] += received

    def queries(self) -> torch.Tensor:
        """[num_layers, num_queries, num_heads, head_size] - of the last tokens."""
        last = [torch.cat(chunks)[-self._num_queries :] for chunks in self._queries.values()]
        return torch.stack(last)

    def scores(self) -> dict[ScoredQueries, torch.Tensor]:
        """By the queries that count: [num_layers, num_kv_heads, num_tokens], float32."""
        received = torch.stack([self._received[layer] for layer in self._queries], dim=1)
        scores = dict(zip(self._spans, received, strict=True))
        # What counts from one position on also counts from every earlier one.
        for later, earlier in pairwise(reversed(self._spans)):
            if later.stride == earlier.stride:
                scores[earlier] += scores[later]
        return scores


def _spans(scored: Collection[ScoredQueries], num_tokens: int) -> dict[ScoredQueries, int]:
    """Where queries end that count for these, but for no later ones of the same stride.

    So that each query is looked at once for each stride.
    """
    ordered = sorted(set(scored), key=lambda queries: (queries.stride, queries.first))
    ends = dict.fromkeys(ordered, num_tokens)
    for queries, after in pairwise(ordered):
        if after.stride == queries.stride:
            ends[queries] = after.first
    return ends


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    observer: PromptObserver,
    cache_format: CacheFormat,
) -> Prefilled:
    """Process a prompt.

    Args:
        model: Loaded with attention.IMPLEMENTATION.
        token_ids: The prompt.
        observer: A new one.
        cache_format: In which the prompt's queries see its keys and values.
    """
    cache = empty_cache(model.config, cache_format)
    with observed_by(observer):
        for start in range(0, len(token_ids), _CHUNK):
            chunk = torch.tensor([token_ids[start : start + _CHUNK]], device=model.device)
            logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
    return Prefilled(
        layers=observer.layers,
        token_ids=token_ids,
        logits=logits[0, -1],
        cache=cache,
        queries=observer.queries(),
        scores=observer.scores(),
    )
