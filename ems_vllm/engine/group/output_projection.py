# SPDX-License-Identifier: Apache-2.0
"""What turns the outputs of attention heads into the output of their layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

if TYPE_CHECKING:
    from torch import nn


def output_weights(model: nn.Module, layers: Sequence[Any]) -> list[torch.Tensor | None]:
    """Weights of the output projections of some attention layers.

    Args:
        model: That they are part of.
        layers: vLLM's `Attention`.

    Returns:
        For each, [hidden_size, num_heads * head_size of this rank]: on a GPU the model's own
        memory, on a CPU a copy. None where the module that holds a layer has no such projection, or
        its weight is quantised on a GPU, where a copy would need room that nobody set aside.
    """
    found: dict[int, torch.Tensor | None] = {}
    wanted = {id(layer): layer for layer in layers}
    for module in model.modules():
        children: list[Any] = [getattr(child, "base_layer", child) for child in module.children()]
        linears = [child for child in children if isinstance(child, RowParallelLinear)]
        for child in children:
            if id(child) in wanted and len(linears) == 1:
                found[id(child)] = _weight(linears[0], child.num_heads * child.head_size)
    return [found.get(id(layer)) for layer in layers]


@torch.inference_mode()
def _weight(linear: Any, width: int) -> torch.Tensor | None:
    if linear.input_size_per_partition != width:
        return None
    if _is_on_host(linear):
        # vLLM packs weights on a CPU: what they make of the identity are the weights.
        identity = torch.eye(width, dtype=linear.params_dtype)
        applied: torch.Tensor = linear.quant_method.apply(linear, identity, bias=None)
        return applied.t().contiguous()
    weight: torch.Tensor = linear.weight
    is_plain = isinstance(linear.quant_method, UnquantizedLinearMethod)
    return weight.data if is_plain and weight.shape == (linear.output_size, width) else None


def _is_on_host(linear: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in linear.parameters())
