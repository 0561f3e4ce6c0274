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


class PromptCam(BasePress):  # type: ignore[misc]
    """What `CAMPress` leaves where the last tokens of the prompt are decoded.

    CAMPress adds up attention over the tokens since its last compression and merges as many
    evicted entries. So all but the last tokens of the prompt are processed, those are decoded, and
    all entries beyond N are merged or dropped when the last one is there. The same comes of the
    queries of one prefill, which spares the decoding. More tokens, and with them more merging,
    would not help: merged values are added, not averaged, and grow.

    Args:
        base_press: Scores.
        entries: N; None keeps all.
        num_decoded: How many are the last tokens.
    """

    def __init__(self, base_press: ScorerPress, entries: int | None, num_decoded: int) -> None:
        self.base_press = base_press
        self.entries = entries
        self.num_decoded = num_decoded

    def compress(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.entries is None or self.entries >= keys.shape[2]:
            return keys, values
        cam = CAMPress(self.base_press, target_size=self.entries)
        received = received_attention(module, hidden_states, keys, kwargs, self.num_decoded)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        cam.layer_step_counts[layer] = self.num_decoded
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
    cos, sin = (table[:, -num_queries:] for table in kwargs["position_embeddings"])
    queries = get_prerope_query_states(module, hidden_states[:, -num_queries:])
    queries, _ = apply_rotary_pos_emb(queries, queries, cos, sin)
    grouped = queries.reshape(1, num_kv_heads, -1, head_size)
    logits = grouped @ keys.transpose(-2, -1) / math.sqrt(head_size)
    entries = torch.arange(length, device=keys.device)
    hidden = entries > entries[-num_queries:, None]
    weights = logits.view(1, num_kv_heads, -1, num_queries, length).float()
    weights = weights.masked_fill(hidden, -torch.inf).softmax(-1)
    return weights.mean(2).sum(2).to(keys.dtype)
