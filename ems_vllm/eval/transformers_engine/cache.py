# SPDX-License-Identifier: Apache-2.0
"""A transformers cache in one of vLLM's formats, of which some layers are compressed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ems_vllm.eval.transformers_engine.quantised import FORMATS, PLAIN, CacheFormat

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


class StoredCache(DynamicCache):
    """Holds what a format makes of keys and values; attention sees that of new ones too.

    Args:
        config: The model's.
        cache_format: How all layers are stored.
    """

    def __init__(self, config: PreTrainedConfig, cache_format: CacheFormat) -> None:
        super().__init__(config=config)
        self.cache_format = cache_format

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of new tokens; returns all that the layer holds."""
        stored = self.stored(layer_idx, key_states, value_states)
        return super().update(*stored, layer_idx, *args, **kwargs)

    def stored(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read of some keys and values, [..., head_size], of a layer."""
        return self.cache_format.stored(keys, values, layer, len(self.layers))


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What each layer attends to, in transformers' words; layers without a cache are left out."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return list(kinds)


def compressed_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that are compressed: those that attend to all that came before."""
    return [index for index, kind in enumerate(layer_kinds(config)) if kind == FULL_ATTENTION]


def empty_cache(
    config: PreTrainedConfig, cache_format: CacheFormat = FORMATS[PLAIN]
) -> StoredCache:
    """A cache with layers of the model's kinds; sliding ones hold their window only."""
    return StoredCache(config, cache_format)


def fork(cache: StoredCache, cache_format: CacheFormat) -> StoredCache:
    """A cache that goes its own way from here; it shares tensors, since updates write new ones.

    Args:
        cache: Of the same format, or of plain numbers, which are then stored.
        cache_format: Of the new one.
    """
    forked = copy(cache)
    forked.layers = [copy(layer) for layer in cache.layers]
    if cache_format is not cache.cache_format:
        forked.cache_format = cache_format
        layers: list[Any] = forked.layers
        for index, layer in enumerate(layers):
            layer.keys, layer.values = forked.stored(index, layer.keys, layer.values)
    return forked


def entries_of(
    cache: DynamicCache, layers: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of each of some layers, [num_kv_heads, num_entries, head_size]; not copied.

    Args:
        cache: Of one sequence; it writes new tensors and never into these.
        layers: Indices of layers.
    """
    chosen: list[Any] = [cache.layers[index] for index in layers]
    return [layer.keys[0] for layer in chosen], [layer.values[0] for layer in chosen]


def read_entries(cache: DynamicCache, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some layers, [num_layers, num_kv_heads, num_entries, head_size]; a copy.

    Args:
        cache: Of one sequence.
        layers: Indices of layers that hold equally many entries.
    """
    keys, values = entries_of(cache, layers)
    return torch.stack(keys), torch.stack(values)


def replace_entries(
    cache: StoredCache, layers: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Store other entries in full-attention layers; the other layers stay as they are.

    transformers builds one mask for each kind of layer, from the first layer of that kind. A full
    layer counts the entries it holds, so its mask goes by their place in the cache; a sliding layer
    counts the tokens it has seen, so its mask goes by position. Both are right, and full layers
    that hold other numbers of entries than the first get masks of their own (see attention).

    Args:
        cache: Of one sequence; changed.
        layers: Indices of full-attention layers.
        keys, values: [num_layers, num_kv_heads, num_entries, head_size]; not copied.
    """
    for index, layer_keys, layer_values in zip(layers, keys, values, strict=True):
        layer: Any = cache.layers[index]
        stored = cache.stored(index, layer_keys[None], layer_values[None])
        layer.keys, layer.values = stored
