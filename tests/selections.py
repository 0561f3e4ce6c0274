# SPDX-License-Identifier: Apache-2.0
"""Random outcomes of select_entries."""

from dataclasses import dataclass

import torch


@dataclass
class Selection:
    """Entries kept and merged, per layer, row and kv_head, in tensors longer than needed.

    Attributes:
        lens, budgets: per row.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32, ascending, then -1.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32, any order, then -1.
    """

    lens: list[int]
    budgets: list[int]
    kept_idx: torch.Tensor | None
    merge_idx: torch.Tensor | None


def random_selection(
    rows: list[tuple[int, int, int]], num_layers: int, num_kv_heads: int
) -> Selection:
    """A selection from rows (num_entries, budget, num_merges)."""
    lens, budgets, num_merges = map(list, zip(*rows, strict=True))
    shape = (num_layers, len(rows), num_kv_heads)
    kept_idx = torch.full((*shape, max(budgets)), -1, dtype=torch.int32)
    merge_idx = torch.full((*shape, max(num_merges)), -1, dtype=torch.int32)
    for layer in range(num_layers):
        for row, (length, budget, merges) in enumerate(rows):
            for head in range(num_kv_heads):
                order = torch.randperm(length, dtype=torch.int32)
                kept_idx[layer, row, head, :budget] = order[:budget].sort().values
                merge_idx[layer, row, head, :merges] = order[budget : budget + merges]
    return Selection(lens, budgets, kept_idx, merge_idx)
