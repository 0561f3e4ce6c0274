# SPDX-License-Identifier: Apache-2.0
"""What a model of transformers does to its keys for their positions."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ems_vllm.policies.rotation import Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def rotation_of(model: PreTrainedModel, layer: int) -> Rotation | None:
    """RoPE of a layer; None for a model without.

    Args:
        model: A decoder.
        layer: Its index. Kinds of layers may turn at different speeds.
    """
    decoder: Any = model.get_decoder()
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return None
    config: Any = model.config.get_text_config(decoder=True)
    positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
    numbers = torch.zeros(1, dtype=torch.float32, device=model.device)
    kinds = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = {"layer_type": config.layer_types[layer]}
    cos, sin = (each[0] for each in rotary(numbers, positions, **kinds))
    half = cos.shape[-1] // 2
    is_neox = torch.equal(cos[:, :half], cos[:, half:])
    angles = slice(None, half) if is_neox else slice(None, None, 2)
    return Rotation(torch.cat([cos[:, angles], sin[:, angles]], dim=-1), is_neox)
