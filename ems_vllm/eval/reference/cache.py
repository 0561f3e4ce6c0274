# SPDX-License-Identifier: Apache-2.0
"""A transformers DynamicCache, of which some layers are compressed and the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What each layer attends to, in transformers' words; layers without a cache are left out."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return list(kinds)


def compressed_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that are compressed: those that attend to all that came before."""
    return [index for index, kind in enumerate(layer_kinds(config)) if kind == FULL]


def empty_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache with layers of the model's kinds; sliding ones hold their window only."""
    return DynamicCache(config=config)


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that goes its own way from here; it shares tensors, since updates write new ones."""
    forked = copy(cache)
    forked.layers = [copy(layer) for layer in cache.layers]
    return forked


def read_entries(cache: DynamicCache, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some layers, [num_layers, num_kv_heads, num_entries, head_size]; a copy.

    Args:
        cache: Of one sequence.
        layers: Indices of layers that hold equally many entries.
    """
    chosen: list[Any] = [cache.layers[index] for index in layers]
    keys = torch.stack([layer.keys[0] for layer in chosen])
    return keys, torch.stack([layer.values[0] for layer in chosen])


def replace_entries(
    cache: DynamicCache, layers: Sequence[int], keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Let all full-attention layers hold other entries; sliding layers stay as they are.

    transformers builds one mask for each kind of layer, from the first layer of that kind. A full
    layer counts the entries it holds, so its mask goes by their place in the cache; a sliding layer
    counts the tokens it has seen, so its mask goes by position. Both are right.

    Args:
        cache: Of one sequence; changed.
        layers: Indices of its full-attention layers.
        keys, values: [num_layers, num_kv_heads, num_entries, head_size]; not copied.
    """
    for index, layer_keys, layer_values in zip(layers, keys, values, strict=True):
        layer: Any = cache.layers[index]
        layer.keys, layer.values = layer_keys[None], layer_values[None]
