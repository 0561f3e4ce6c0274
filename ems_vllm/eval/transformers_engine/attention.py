# SPDX-License-Identifier: Apache-2.0
"""Attention of a transformers model, observed; its layers may hold different numbers of entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
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
_GAPS: ContextVar[Mapping[int, torch.Tensor]] = ContextVar(
    "ems_attention_gaps", default=MappingProxyType({})
)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Hand what attention sees to `observer` too, in this thread and block."""
    token = _OBSERVERS.set((*_OBSERVERS.get(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


@contextmanager
def masked_by(gaps: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Leave out places that hold no entry, in this thread and block.

    Args:
        gaps: By layer, [num_kv_heads]: so many places at the start of each head.
    """
    token = _GAPS.set(gaps)
    try:
        yield
    finally:
        _GAPS.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    any_layer: Any = module.layer_idx
    layer = int(any_layer)
    for observer in _OBSERVERS.get():
        observer(layer, query[0].transpose(0, 1), key[0])
    gaps = _GAPS.get().get(layer)
    if gaps is None:
        attention_mask = _mask_for(query.shape[2], key, attention_mask)
    else:
        visible = visible_behind(gaps.to(key.device), query.shape[2], key.shape[2])
        attention_mask = visible.repeat_interleave(query.shape[1] // key.shape[1], dim=0)[None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def visible_behind(gaps: torch.Tensor, num_queries: int, num_places: int) -> torch.Tensor:
    """What the newest tokens see of heads that start with places without an entry.

    Args:
        gaps: [num_kv_heads].
        num_queries: The newest tokens, whose keys are the last ones.
        num_places: Of each head.

    Returns:
        [num_kv_heads, num_queries, num_places], bool.
    """
    visible = torch.ones(num_queries, num_places, dtype=torch.bool, device=gaps.device)
    is_entry = torch.arange(num_places, device=gaps.device) >= gaps[:, None]
    return visible.tril(num_places - num_queries) & is_entry[:, None]


def _mask_for(
    num_queries: int, keys: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask of a layer, given transformers' for the first layer of its kind.

    transformers builds one mask for each kind of layer. Full-attention layers of another level hold
    another number of entries, all of them before the queries; sliding layers all hold the same.

    Args:
        num_queries: The newest tokens, whose keys are the last ones.
        keys: [1, num_kv_heads, num_entries, head_size].
        mask: [1, 1, num_queries, entries of the first layer]; None where all is seen that came
            before.

    Returns:
        [1, 1, num_queries, num_entries], or None.
    """
    num_entries = keys.shape[2]
    num_masked = num_queries if mask is None else mask.shape[-1]
    if (num_queries == 1 and mask is None) or num_masked == num_entries:
        return mask
    visible = torch.ones(num_queries, num_entries, dtype=torch.bool, device=keys.device)
    return visible.tril(num_entries - num_queries)[None, None]


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
