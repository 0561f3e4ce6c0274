# SPDX-License-Identifier: Apache-2.0
"""What a model of vLLM does to its keys for their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from ems_vllm.policies.rotation import Rotation

if TYPE_CHECKING:
    from torch import nn


def rotations(model: nn.Module, layers: Sequence[nn.Module]) -> list[Rotation | None]:
    """RoPE of some attention layers.

    Args:
        model: That they are part of.
        layers: vLLM's `Attention`.

    Returns:
        One for each; None where the module that holds a layer has no rotary embedding of the usual
        kind: models without, and those that turn keys in a way of their own.
    """
    found: dict[int, Rotation] = {}
    wanted = {id(layer) for layer in layers}
    for module in model.modules():
        children = list(module.children())
        rotary = next((c for c in children if isinstance(c, RotaryEmbeddingBase)), None)
        if rotary is not None and _is_usual(rotary):
            rotation = Rotation(rotary.cos_sin_cache, rotary.is_neox_style)
            found |= {id(child): rotation for child in children if id(child) in wanted}
    return [found.get(id(layer)) for layer in layers]


def _is_usual(rotary: RotaryEmbeddingBase) -> bool:
    """Whether all kv_heads turn alike, by one angle for each pair of dimensions."""
    table = getattr(rotary, "cos_sin_cache", None)
    return table is not None and table.dim() == 2 and table.shape[1] == rotary.rotary_dim
