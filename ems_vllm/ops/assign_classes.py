# SPDX-License-Identifier: Apache-2.0
"""The kept entry that an entry to be merged joins."""

import torch
from torch.nn.functional import normalize

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries


@operator
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
    """Assign every entry to be merged to the kept entry it is most redundant with.

    Paper: EMS, 2024, arXiv:2412.08521 (redundancy of a pair, zero class for what fits nowhere).
    The threshold is ours.

    The redundancy of entries t and c is max(cos(k_t, k_c), 0) * max(cos(v_t, v_c), 0), where the
    cosine with a zero vector is 0. Ties go to the lower rank. Protected entries take no members.

    Args:
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float.
        value_cache: like key_cache.
        block_table: [num_rows, num_columns], int32.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32 - from select_entries.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - from select_entries.
        budgets: [num_rows], int32 - valid ranks of kept_idx.
        num_protected: [num_rows], int32 - entries below this index take no members.
        similarity_threshold: least redundancy of a member.
        class_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32.
    Mutates:
        class_idx: rank of the class centre in kept_idx, or budgets[r], the zero class, for an
            entry below the threshold and where merge_idx is -1.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index is out of range.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    # In float64, whatever the inputs are.
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
