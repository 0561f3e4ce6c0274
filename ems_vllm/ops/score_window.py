# SPDX-License-Identifier: Apache-2.0
"""Scores of entries by the attention of the last queries."""

import torch

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries


@operator
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
    """Score entries by the attention of the last queries, which a ring buffer holds.

    Paper: SnapKV, 2024, arXiv:2404.14469 (observation window), without its pooling. Deviation:
    query heads are averaged within the group of their kv_head.

    The query of age k (0 is the newest) of row r lies at ring[:, ring_rows[r],
    (end_positions[r] - 1 - k) % obs_window] and sees live entries 0..live_lens[r]-1-k. A query
    that sees nothing adds nothing.

    Args:
        ring: [num_layers, num_ring_rows, obs_window, num_heads, head_size], float.
        ring_rows: [num_rows], int32 - the row's place in the ring.
        num_queries: [num_rows], int32 - queries to use, <= obs_window and <= end_positions.
        end_positions: [num_rows], int32 - one more than the position of the newest query.
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float, or
            float8_e4m3fn.
        block_table: [num_rows, num_columns], int32 - its column 0 holds entry 0.
        live_lens: [num_rows], int32 - entries the newest query sees.
        num_entries: [num_rows], int32 - entries to score, <= live_lens and <= max_entries.
        scale: factor >= 0 on the dot products before the softmax.
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32 - higher is kept.
        key_scales: [num_layers], float32, or None - what stored keys are multiplied with; 1 each
            where None.
        peaks: like scores, or None - the most attention that an entry receives from a single query
            of a single query head (ours).
    Mutates:
        scores, peaks: all of them; 0 beyond num_entries.
    Raises:
        RuntimeError: a shape, dtype, device, stride or the scale is not as above; on the CPU also
            when an index or a length is out of range.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    # In float64, whatever the inputs are.
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
