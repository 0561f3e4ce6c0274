# SPDX-License-Identifier: Apache-2.0
"""Reference of select_entries."""

import torch


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
    """See ems_vllm.ops.select_entries."""
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
