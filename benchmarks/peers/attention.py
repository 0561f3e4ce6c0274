# SPDX-License-Identifier: Apache-2.0
"""sdpa attention that can be told, per kv_head, which entries are seen.

kvpress hides entries by overwriting their keys with one that all queries of a kv_head dislike. It
takes several tokens at a time too, but has to find such a key anew at every step and gives up where
there is none. A mask needs no luck, and is what the methods mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Before the registration below: it patches every attention that is registered.
import kvpress  # noqa: F401
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "peers_sdpa"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    *,
    decode_masks: Sequence[torch.Tensor | None] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention.

    Args:
        module, query, key, value, attention_mask, dropout, kwargs: As transformers calls every
            attention.
        decode_masks: Instead of `attention_mask`, one for every layer: bool, [num_answers,
            num_kv_heads, num_queries, num_entries], True where a query sees an entry; None where
            a single query sees all of them.
    """
    if decode_masks is not None:
        attention_mask = decode_masks[module.layer_idx]
        if attention_mask is not None:
            num_groups = query.shape[1] // attention_mask.shape[1]
            attention_mask = attention_mask.repeat_interleave(num_groups, dim=1)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
