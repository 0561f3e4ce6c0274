# SPDX-License-Identifier: Apache-2.0
"""A transformers DynamicCache as two tensors, and back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache


def to_cache(keys: torch.Tensor, values: torch.Tensor) -> DynamicCache:
    """A cache of one sequence; a copy.

    Args:
        keys, values: [num_layers, num_kv_heads, num_entries, head_size].
    """
    cache = DynamicCache()
    for layer, (layer_keys, layer_values) in enumerate(zip(keys, values, strict=True)):
        cache.update(layer_keys[None], layer_values[None], layer)
    return cache


def from_cache(cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [num_layers, num_kv_heads, num_entries, head_size]; a copy."""
    layers: list[Any] = cache.layers
    keys = torch.stack([layer.keys[0] for layer in layers])
    values = torch.stack([layer.values[0] for layer in layers])
    return keys, values
