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

_OBSERVER: ContextVar[Observer | None] = ContextVar("ems_attention_observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Hand what attention sees to `observer`, in this thread and block."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    observer = _OBSERVER.get()
    if observer is not None:
        layer: Any = module.layer_idx
        observer(int(layer), query[0].transpose(0, 1), key[0])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
