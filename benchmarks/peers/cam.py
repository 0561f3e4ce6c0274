# SPDX-License-Identifier: Apache-2.0
"""CaM, which merges while decoding, on a prompt that is processed at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from kvpress import CAMPress
from kvpress.presses.base_press import BasePress
from kvpress.presses.scorer_press import ScorerPress
from kvpress.utils import get_prerope_query_states
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

_BLOCK = 256


class PromptCam(BasePress):  # type: ignore[misc]
    """What `CAMPress` leaves where the prompt is written token by token after its first N.

    CAMPress adds up attention over the tokens since its last compression and merges as many
    evicted entries. So the first N tokens, which fit, are processed, the others decoded, and all
    entries beyond N are merged or dropped when the last one is there. The same comes of the
    queries of one prefill, which spares the decoding.

    Args:
        base_press: Scores.
        entries: N; None keeps all.
    """

    def __init__(self, base_press: ScorerPress, entries: int | None) -> None:
        self.base_press = base_press
        self.entries = entries

    def compress(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_evicted = keys.shape[2] - (keys.shape[2] if self.entries is None else self.entries)
        if num_evicted <= 0:
            return keys, values
        cam = CAMPress(self.base_press, target_size=self.entries)
        received = received_attention(module, hidden_states, keys, kwargs, num_evicted)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        cam.layer_step_counts[layer] = num_evicted
        cam._running_attn_sum[layer] = received
        # It adds to the values in place.
        result: tuple[torch.Tensor, torch.Tensor] = cam.compress(
            module, hidden_states, keys, values.clone(), received, kwargs
        )
        return result


def received_attention(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    kwargs: dict[str, Any],
    num_queries: int,
) -> torch.Tensor:
    """Attention that entries get from the last queries, added up as CAMPress does.

    Returns:
        [1, num_kv_heads, num_entries], of the dtype of the keys: the mean over a kv_head's
        queries, the sum over positions.
    """
    _, num_kv_heads, length, head_size = keys.shape
    cos, sin = kwargs["position_embeddings"]
    total = torch.zeros((1, num_kv_heads, length), device=keys.device)
    entries = torch.arange(length, device=keys.device)
    for start in range(length - num_queries, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        queries = get_prerope_query_states(module, hidden_states[:, start:stop])
        queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, start:stop], sin[:, start:stop])
        grouped = queries.reshape(1, num_kv_heads, -1, head_size)
        logits = grouped @ keys[:, :, :stop].transpose(-2, -1) / math.sqrt(head_size)
        logits = logits.view(1, num_kv_heads, -1, stop - start, stop)
        hidden = entries[:stop] > entries[start:stop, None]
        weights = logits.float().masked_fill_(hidden, -torch.inf).softmax(-1)
        total[..., :stop] += weights.mean(2).sum(2)
    return total.to(keys.dtype)
