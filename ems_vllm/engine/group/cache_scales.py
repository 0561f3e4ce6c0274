# SPDX-License-Identifier: Apache-2.0
"""Scales of the layers whose cache is float8, read from vLLM's attention layers.

A stored key times the layer's key scale is the key that attention sees. Merging cares for ratios
within a layer only and works on what is stored; scoring takes the scale into its softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.engine.cache_dtype import FLOAT8_CACHES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerScales:
    """What numbers of a layer are multiplied with to get what they stand for.

    Attributes:
        key: Factor of stored keys.
        query: Factor of queries, where attention is given float8 ones; [], float32, the layer's
            own tensor, so that a CUDA graph that multiplies with it follows new weights.
    """

    key: float = 1.0
    query: float | torch.Tensor = 1.0


def layer_scales(layer: Any) -> LayerScales:
    """Scales of a loaded layer; they change only when weights are loaded again.

    Args:
        layer: vLLM's Attention.
    """
    if layer.kv_cache_dtype not in FLOAT8_CACHES:
        # A checkpoint's scales are for a float8 cache; without one vLLM ignores them too.
        return LayerScales()
    return LayerScales(key=float(layer._k_scale), query=layer._q_scale.view(()))


def has_scales_per_head(layer: Any) -> bool:
    """Whether a checkpoint brought a scale for every kv_head.

    Args:
        layer: vLLM's Attention.
    """
    return layer.kv_cache_dtype in FLOAT8_CACHES and layer._k_scale.numel() > 1
