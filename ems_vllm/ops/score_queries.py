# SPDX-License-Identifier: Apache-2.0
"""Scores of keys by the attention of a batch of queries."""

import torch

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries


def is_sampled(positions: torch.Tensor, stride: int) -> torch.Tensor:
    """Which query positions score: of every `stride` of them, one that a hash picks.

    Args:
        positions: [n], int64.
        stride: Positions per stratum.
    Returns:
        [n], bool.
    """
    strata = positions // stride
    hashes = ((strata + 1) * 0x9E3779B1) % 2**32
    return strata * stride + (hashes >> 16) % stride == positions


@operator
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
    """Add the attention that a batch of queries pays to every key, summed over the queries.

    Paper: EMS, 2024, arXiv:2412.08521 (global score: column sums of the attention matrix).
    Deviation: query heads are averaged within the group of their kv_head.

    Query i of row r sits at position seq_lens[r] - query_lens[r] + i and sees the keys up to and
    including its own. The share of key j in its softmax, averaged over the group and summed over
    i, is added to the score of j if j < accumulate_lens[r], and replaces it otherwise. Chunks of
    one prompt therefore add up when accumulate_lens is the length already scored.

    With a sample_stride s > 1 (ours), only one query position in every s scores, and what it adds
    counts s times. Which one depends on the position alone, so chunks sample the same queries
    however a prompt is cut.

    Args:
        query: [num_tokens, num_heads, head_size], float.
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], float - holds the keys of
            these queries too.
        block_table: [num_rows, num_columns], int32.
        query_starts: [num_rows], int32 - index of the row's first query in `query`.
        query_lens: [num_rows], int32 - queries of the row.
        seq_lens: [num_rows], int32 - keys of the row, its queries' own included.
        accumulate_lens: [num_rows], int32 - leading positions whose score is added to.
        score_table: [num_rows, num_score_columns], int32 - pages of `scores`; no page appears
            twice.
        lse: [num_tokens, num_heads], float32, or None - log of the softmax denominator (natural
            log, scale included) as attention kernels return it; None computes it.
            Needed for sampled queries only.
        scale: factor >= 0 on the dot products before the softmax; the scale of a float8 cache is
            part of it.
        sample_stride: 1..64.
        scores: [num_pages, num_kv_heads, block_size], float32 - higher is kept.
    Mutates:
        scores: the slots of positions 0..seq_lens[r]-1 of every row; no other slot.
    Raises:
        RuntimeError: a shape, dtype, device, stride or the scale is not as above; on the CPU also
            when an index or a length is out of range.
    Note: no host sync; deterministic, whatever the number of threads; workspace of num_tokens *
        num_heads floats when lse is None, never a square one.
    """
    # In float64, whatever the inputs are.
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
