# SPDX-License-Identifier: Apache-2.0
"""Reference of score_queries."""

import torch

from ems_vllm.ops.paging import gather_entries

_SAMPLE_BLOCK = 64


def is_sampled(positions: torch.Tensor, stride: int) -> torch.Tensor:
    """Which query positions score: of every `stride` blocks of them, one that a hash picks.

    Args:
        positions: [n], int64.
        stride: Blocks per stratum.
    Returns:
        [n], bool.
    """
    blocks = positions // _SAMPLE_BLOCK
    strata = blocks // stride
    hashes = ((strata + 1) * 0x9E3779B1) % 2**32
    return strata * stride + (hashes >> 16) % stride == blocks


def score_queries(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    accumulate_lens: torch.Tensor,
    score_table: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    sample_stride: int,
    scores: torch.Tensor,
) -> None:
    """See ems_vllm.ops.score_queries. Runs in float64."""
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    for row in range(block_table.shape[0]):
        start, num_queries = int(query_starts[row]), int(query_lens[row])
        seq_len, accumulate_len = int(seq_lens[row]), int(accumulate_lens[row])
        keys = gather_entries(key_cache, block_table[row], seq_len).double()
        queries = query[start : start + num_queries].double()
        queries = queries.unflatten(1, (num_kv_heads, group))

        logits = scale * torch.einsum("ihgd,hjd->hgij", queries, keys)
        positions = seq_len - num_queries + torch.arange(num_queries, device=query.device)
        hidden = torch.arange(seq_len, device=query.device) > positions[:, None]
        logits = logits.masked_fill(hidden, float("-inf"))
        if lse is None:
            row_lse = logits.logsumexp(dim=-1)
        else:
            row_lse = lse[start : start + num_queries].double().unflatten(1, (num_kv_heads, group))
            row_lse = row_lse.permute(1, 2, 0)
        attention = torch.exp(logits - row_lse[..., None]).mean(dim=1)
        sampled = is_sampled(positions, sample_stride)
        new = sample_stride * attention[:, sampled].sum(dim=1)

        for position in range(seq_len):
            page, offset = int(score_table[row, position // block_size]), position % block_size
            if position < accumulate_len:
                scores[page, :, offset] += new[:, position].float()
            else:
                scores[page, :, offset] = new[:, position].float()
