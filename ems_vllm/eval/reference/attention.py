# SPDX-License-Identifier: Apache-2.0
"""What the attention layers of a transformers model see, handed to an observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "ems_observed"
"""Name of the attention implementation that a model must be loaded with."""

Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called after every layer's projections with the layer's index, its queries after RoPE
[num_tokens, num_heads, head_size], and all its keys [num_kv_heads, num_entries, head_size]."""

_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("ems_attention_observers", default=())


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Hand what attention sees to `observer` too, in this thread and block."""
    token = _OBSERVERS.set((*_OBSERVERS.get(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    for observer in _OBSERVERS.get():
        layer: Any = module.layer_idx
        observer(int(layer), query[0].transpose(0, 1), key[0])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
