# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are compressed, and what presses need to know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLIDING = "sliding_attention"


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """Of every layer, how many positions it looks back; None for all.

    Only the latter are compressed. kvpress knows the others by the class of Gemma 3 with images
    only, and would compress them in the same model without.
    """
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return [config.sliding_window if kind == _SLIDING else None for kind in kinds]


class _Rotary:
    """Rotary embedding of one kind of layer, for presses that know of one kind only."""

    def __init__(self, rotary: Any, kind: str) -> None:
        self._rotary = rotary
        self._kind = kind
        self.inv_freq: torch.Tensor = getattr(rotary, f"{kind}_inv_freq")

    def __call__(
        self, tensor: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = self._rotary(tensor, position_ids, self._kind)
        return result


def attentions(model: PreTrainedModel) -> list[Any]:
    """The attention modules of all layers, with the rotary embedding where presses look for it."""
    decoder: Any = model.get_decoder()
    modules = [layer.self_attn for layer in decoder.layers]
    for module in modules:
        kind = getattr(module, "layer_type", None)
        is_common = kind is None or not hasattr(decoder.rotary_emb, f"{kind}_inv_freq")
        module.rotary_emb = decoder.rotary_emb if is_common else _Rotary(decoder.rotary_emb, kind)
    return modules
