# SPDX-License-Identifier: Apache-2.0
"""Reference of assign_classes."""

import torch
from torch.nn.functional import normalize

from ems_vllm.ops.paging import gather_entries


def assign_classes(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
    budgets: torch.Tensor,
    num_protected: torch.Tensor,
    similarity_threshold: float,
    class_idx: torch.Tensor,
) -> None:
    """See ems_vllm.ops.assign_classes. Runs in float64."""
    class_idx.copy_(budgets[None, :, None, None].expand_as(class_idx))
    num_layers, num_rows, num_kv_heads, _ = merge_idx.shape
    for layer in range(num_layers):
        for row in range(num_rows):
            for head in range(num_kv_heads):
                centres = kept_idx[layer, row, head, : int(budgets[row])].long()
                members = merge_idx[layer, row, head]
                members = members[members >= 0].long()
                if len(members) == 0 or len(centres) == 0:
                    continue
                redundancy = key_cache.new_ones(len(members), len(centres), dtype=torch.float64)
                for cache in (key_cache, value_cache):
                    num_read = int(torch.cat([centres, members]).max()) + 1
                    entries = gather_entries(cache[layer], block_table[row], num_read)[head]
                    units = normalize(entries.double(), dim=-1, eps=1e-300)
                    redundancy *= (units[members] @ units[centres].T).clamp(min=0)
                redundancy[:, centres < num_protected[row]] = float("-inf")
                best, best_idx = redundancy.max(dim=1)
                merged = best >= similarity_threshold
                class_idx[layer, row, head, : len(members)][merged] = best_idx[merged].int()
