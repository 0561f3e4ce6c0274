# SPDX-License-Identifier: Apache-2.0
"""Weights of entries by their ranks in several orders."""

import torch

from ems_vllm.ops.library import operator


@operator
def rank_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_protected: torch.Tensor,
    is_protected: torch.Tensor | None,
    share: float,
    first: int,
    weights: torch.Tensor,
) -> None:
    """Raise the weight of every entry to what an order of the entries gives to its rank.

    Ours. Called with several orders one after the other, and weights that begin at 0, it leaves
    each entry the weight of the order that ranks it best, whatever the units of their scores.

    The entries of a kv_head that are not protected are candidates. The order gives its candidate
    of rank r, by descending score from 0, ties to the lower index, the weight 1 / (1 + claim):

        claim = r / first                       of the first `first` ranks,
                1 + (r - first) / share         of the others

    A claim is the budget from which on the order wants the entry (alignment.by_quantile).

    Args:
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32 - finite and >= 0;
            higher is kept. Others are ranked as well, by their magnitude and NaN first.
        num_entries: [num_rows], int32 - entries of the row, <= max_entries.
        num_protected: [num_rows], int32 - leading entries that are no candidates, <= num_entries.
        is_protected: like scores, bool, or None for none - further entries that are none.
        share: part of any budget that the order fills, > 0.
        first: entries that it fills before any other has its turn, >= 0.
        weights: like scores - of candidates, those so far, >= 0.
    Mutates:
        weights: all of them; in (0, 1] of candidates, 1 of other entries, 0 beyond num_entries.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above, or share or first is out of
            range; on the CPU also when a count is.
    Note: no host sync; deterministic, the same on all devices.
    Workspace: on a GPU at most 32 MiB, or 16 bytes for each entry of a kv_head if that is more.
    """
    num_layers, num_rows, num_kv_heads, max_entries = scores.shape
    ranks = torch.arange(max_entries, dtype=torch.float32, device=scores.device)
    claims = torch.where(ranks < first, ranks / max(first, 1), (ranks - first) / share + 1)
    by_rank = 1 / (claims + 1)
    for layer in range(num_layers):
        for row in range(num_rows):
            length = int(num_entries[row])
            for head in range(num_kv_heads):
                is_candidate = ranks[:length] >= num_protected[row]
                if is_protected is not None:
                    is_candidate &= ~is_protected[layer, row, head, :length]
                candidates = is_candidate.nonzero().squeeze(1)
                magnitudes = scores[layer, row, head, candidates].abs()
                order = candidates[magnitudes.sort(descending=True, stable=True).indices]
                of_head = weights[layer, row, head]
                of_head[order] = of_head[order].maximum(by_rank[: len(order)])
                of_head[:length][~is_candidate] = 1
                of_head[length:] = 0
