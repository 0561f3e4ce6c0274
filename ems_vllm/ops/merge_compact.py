# SPDX-License-Identifier: Apache-2.0
"""Merging of classes, and their move to the target columns."""

from enum import IntEnum
from itertools import chain

import torch

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries

# Key, value and score of a class.
_Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class KeyMerge(IntEnum):
    """What the key of a class is made of, before mass is added."""

    CENTRE = 0
    DIRECTION = 1
    MEAN = 2


@operator
def merge_compact(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    accumulated_pages: torch.Tensor | None,
    weights: torch.Tensor,
    carry: torch.Tensor | None,
    key_merge: int,
    sums_values: bool,
    mass_keys: torch.Tensor | None,
    block_table: torch.Tensor,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
    class_idx: torch.Tensor,
    budgets: torch.Tensor,
    target_columns: torch.Tensor,
    rows_together: int = 1,
) -> None:
    """Merge members into their class centres and write the classes to the target columns.

    Paper: EMS, 2024, arXiv:2412.08521 (keys merge in direction and keep the centre's norm, values
    merge as a weighted mean). Means of keys are those of KVMerger (arXiv:2407.08454) and others,
    sums of values those of CaM (Zhang et al. 2024, ICML). The mass is ours.

    Class b of row r has the centre c = kept_idx[b] and the members merge_idx[t] with class_idx[t]
    == b. It is written to column target_columns[r] + b // block_size, slot b % block_size, of the
    same kv_head, as if everything of the row's group were read before anything of it is written; a
    group is rows_together consecutive rows, from row 0 on:

        value = (w_c v_c + sum w_t v_t) / w,  w = w_c + sum w_t;  with sums_values / w_c
        key   = k_c                                                         where key_merge is 0
                |k_c| d / |d|,  d = w_c k_c / |k_c| + sum w_t k_t / |k_t|                      1
                (w_c k_c + sum w_t k_t) / w                                                    2
                plus log(min(w / w_c, 1 + number of members)) * mass_key

    A softmax over kept entries alone gives a class the attention of its centre. What all its
    entries received is w / w_c times that: a constant on the logit, which no attention kernel
    takes. A mass_key m with q m * scale = 1 for the queries to come adds it to the key instead.

    A class without members is its centre, bit for bit; so is one where w <= 0, with sums_values
    w_c <= 0, or where directions merge and |k_c| = 0 or |d| = 0. A member with a zero key adds no
    direction. Members of the zero class, budgets[r], vanish.

    Args:
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float.
        value_cache: like key_cache.
        accumulated_pages: [num_layers, num_pages, num_kv_heads, block_size], float32, or None -
            scores by cache block; needs carry.
        weights: [num_layers, num_rows, num_kv_heads, max_entries], float32 - weight of an entry.
        carry: [num_layers, num_rows, num_kv_heads, max_entries], float32, or None - score of an
            entry; a class has the sum of its entries' scores.
        key_merge: one of KeyMerge.
        sums_values: whether values of members are added instead of averaged.
        mass_keys: [num_layers, num_rows, num_kv_heads, head_size], float32, or None - what is added
            to a key that shall receive e times the attention, in the units of stored keys.
        block_table: [num_rows, num_columns], int32 - a block of a target column is no other row's
            target, and no source of a row outside of the group.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32 - from select_entries.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - from select_entries.
        class_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - from assign_classes.
        budgets: [num_rows], int32 - valid ranks of kept_idx.
        target_columns: [num_rows], int32 - first column to write to.
        rows_together: rows of a group, which share blocks; divides num_rows.
    Mutates:
        key_cache, value_cache: slots 0..budgets[r]-1 from the target column on; no other slot.
        accumulated_pages: the same slots.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above, only one of
            accumulated_pages and carry is given, or rows_together is below 1 or does not divide
            num_rows; on the CPU also when an index is out of range; on a GPU also when a group has
            more than 65535 kv_heads.
    Workspace: on a GPU at most 32 MiB, or what a group takes if that is more: `merge_scratch_bytes`
        of engine/worker/memory.py. On a CPU the merged classes of a group, for every thread.
    Note: no host sync; deterministic: members are added in the order of merge_idx.
    """
    # In float64, whatever the inputs are.
    num_layers, num_rows, num_kv_heads, _ = kept_idx.shape

    def merged_classes(layer: int, row: int, head: int) -> list[_Merged]:
        at, budget = (layer, row, head), int(budgets[row])
        centres = kept_idx[at][:budget].tolist()
        classes = _members_of_class(merge_idx[at].tolist(), class_idx[at].tolist(), budget)
        num_read = 1 + max(chain([-1], centres, *classes))
        # Copies, so that a destination may also be a source.
        keys, values = (
            gather_entries(cache[layer], block_table[row], num_read)[head]
            for cache in (key_cache, value_cache)
        )
        mass_key = None if mass_keys is None else mass_keys[at].double()
        found = []
        for centre, members in zip(centres, classes, strict=True):
            key, value = _merge(
                keys, values, weights[at], key_merge, sums_values, mass_key, centre, members
            )
            score = None if carry is None else carry[at][[centre, *members]].double().sum().float()
            found.append((key, value, score))
        return found

    def write(layer: int, row: int, head: int, found: list[_Merged]) -> None:
        block_size, table_row = key_cache.shape[3], block_table[row].tolist()
        for rank, (key, value, score) in enumerate(found):
            block = table_row[int(target_columns[row]) + rank // block_size]
            slot = (layer, block, head, rank % block_size)
            key_cache[slot], value_cache[slot] = key, value
            if accumulated_pages is not None and score is not None:
                accumulated_pages[slot] = score

    for layer in range(num_layers):
        for first in range(0, num_rows, rows_together):
            group = range(first, first + rows_together)
            for head in range(num_kv_heads):
                found = [merged_classes(layer, row, head) for row in group]
                for row, classes in zip(group, found, strict=True):
                    write(layer, row, head, classes)


def _members_of_class(merge_idx: list[int], class_idx: list[int], budget: int) -> list[list[int]]:
    classes: list[list[int]] = [[] for _ in range(budget)]
    for entry, cls in zip(merge_idx, class_idx, strict=True):
        if entry >= 0 and cls < budget:
            classes[cls].append(entry)
    return classes


def _merge(
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    key_merge: int,
    sums_values: bool,
    mass_key: torch.Tensor | None,
    centre: int,
    members: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of one class in the dtype of the cache; the centre's own if it is alone."""
    unchanged = keys[centre], values[centre]
    if not members:
        return unchanged
    entries = [centre, *members]
    weight = weights[entries].double()
    key, value = keys[entries].double(), values[entries].double()
    norms = key.norm(dim=-1)
    units = torch.where(norms[:, None] > 0, key / norms[:, None], 0.0)
    direction = weight @ units
    has_direction = direction.norm() > 0 and norms[0] > 0
    divisor = weight[0] if sums_values else weight.sum()
    if min(divisor, weight.sum()) <= 0 or (key_merge == KeyMerge.DIRECTION and not has_direction):
        return unchanged
    merged_key = key[0]
    if key_merge == KeyMerge.DIRECTION:
        merged_key = norms[0] * direction / direction.norm()
    elif key_merge == KeyMerge.MEAN:
        merged_key = weight @ key / weight.sum()
    if mass_key is not None:
        mass = (weight.sum() / weight[0]).clamp(max=len(entries)).log()
        merged_key = merged_key + mass * mass_key
    merged_value = weight @ value / divisor
    return merged_key.to(keys.dtype), merged_value.to(values.dtype)
