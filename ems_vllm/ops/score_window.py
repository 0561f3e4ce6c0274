# SPDX-License-Identifier: Apache-2.0
"""Reference of score_window."""

import torch

from ems_vllm.ops.paging import gather_entries


def score_window(
    ring: torch.Tensor,
    ring_rows: torch.Tensor,
    num_queries: torch.Tensor,
    end_positions: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    live_lens: torch.Tensor,
    num_entries: torch.Tensor,
    scale: float,
    scores: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    peaks: torch.Tensor | None = None,
) -> None:
    """See ems_vllm.ops.score_window. Runs in float64."""
    num_layers, _, window = ring.shape[:3]
    num_kv_heads = key_cache.shape[2]
    scores.zero_()
    if peaks is not None:
        peaks.zero_()
    for layer in range(num_layers):
        for row in range(block_table.shape[0]):
            live_len, entries = int(live_lens[row]), int(num_entries[row])
            keys = gather_entries(key_cache[layer], block_table[row], live_len).double()
            if key_scales is not None:
                keys = keys * key_scales[layer].double()
            for age in range(int(num_queries[row])):
                num_visible = live_len - age
                if num_visible <= 0:
                    continue
                position = int(end_positions[row]) - 1 - age
                query = ring[layer, int(ring_rows[row]), position % window].double()
                query = query.unflatten(0, (num_kv_heads, -1))
                logits = scale * torch.einsum("hgd,hjd->hgj", query, keys[:, :num_visible])
                covered = min(entries, num_visible)
                attention = logits.softmax(dim=-1)[..., :covered]
                scores[layer, row, :, :covered] += attention.mean(dim=1).float()
                if peaks is not None:
                    most = peaks[layer, row, :, :covered]
                    most.copy_(torch.maximum(most, attention.amax(dim=1).float()))
