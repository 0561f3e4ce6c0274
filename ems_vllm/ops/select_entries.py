# SPDX-License-Identifier: Apache-2.0
"""Which entries stay and which are merged into them."""

import torch

from ems_vllm.ops.library import operator


@operator
def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    budgets: torch.Tensor,
    num_protected: torch.Tensor,
    merge_limits: torch.Tensor,
    mass_limit: float,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
) -> None:
    """Select, for every kv_head, the entries that stay and those that are merged into them.

    Paper: EMS, 2024, arXiv:2412.08521 (class centres, to-be-merged and irrelevant tokens). The
    limits on the to-be-merged ones are ours.

    Entries are ranked: the first num_protected in their order, then the others by descending
    score, ties to the lower index. The first budgets[r] stay. Those that follow are merged, at
    most merge_limits[r], and as long as the scores of all ranks up to and including an entry sum
    to at most mass_limit of the total. Everything else is dropped.

    Args:
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32 - finite and >= 0;
            higher is kept.
        num_entries: [num_rows], int32 - entries of the row, <= max_entries.
        budgets: [num_rows], int32 - entries to keep, num_protected..num_entries.
        num_protected: [num_rows], int32 - leading entries that are kept whatever their score.
        merge_limits: [num_rows], int32 - entries to merge at most, <= max_merges.
        mass_limit: share of the total score that kept and merged entries may reach; 1 or more is
            no limit.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - max_merges may be 0.
    Mutates:
        kept_idx: entries in ascending order, then -1.
        merge_idx: entries in order of rank, then -1.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when a
            count is out of range.
    Note: no host sync; deterministic; sums of scores in float64.
    """
    kept_idx.fill_(-1)
    merge_idx.fill_(-1)
    num_layers, num_rows, num_kv_heads, _ = scores.shape
    for layer in range(num_layers):
        for row in range(num_rows):
            budget, limit = int(budgets[row]), int(merge_limits[row])
            for head in range(num_kv_heads):
                row_scores = scores[layer, row, head, : int(num_entries[row])].double()
                ranking = _rank(row_scores, int(num_protected[row]))
                kept_idx[layer, row, head, :budget] = ranking[:budget].sort().values
                candidates = ranking[budget : budget + limit]
                if mass_limit < 1:
                    mass = row_scores[ranking].cumsum(0)[budget : budget + limit]
                    candidates = candidates[mass <= mass_limit * row_scores.sum()]
                merge_idx[layer, row, head, : len(candidates)] = candidates


def _rank(scores: torch.Tensor, num_protected: int) -> torch.Tensor:
    """Entry indices, protected ones first, then by descending score, ties to the lower index."""
    order = scores[num_protected:].sort(descending=True, stable=True).indices + num_protected
    protected = torch.arange(num_protected, device=scores.device)
    return torch.cat([protected, order])
