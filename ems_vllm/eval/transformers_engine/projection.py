# SPDX-License-Identifier: Apache-2.0
"""What turns the outputs of attention heads into the output of their layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ems_vllm.config import ConfigError
from ems_vllm.config.errors import shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def output_projections(
    model: PreTrainedModel, layers: Sequence[int], remedy: str
) -> list[torch.nn.Linear]:
    """Output projections of some layers.

    Args:
        model: A decoder.
        layers: Their indices.
        remedy: What to do where a model has none.

    Raises:
        ConfigError: there are none by the usual name.
    """
    decoder: Any = model.get_decoder()
    found = [getattr(decoder.layers[layer].self_attn, "o_proj", None) for layer in layers]
    if any(projection is None for projection in found):
        raise ConfigError(
            f"model={shown(model.config.name_or_path)} has attention without `o_proj`, which is "
            f"asked for: {remedy}."
        )
    return [projection for projection in found if projection is not None]
