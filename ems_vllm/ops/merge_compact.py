# SPDX-License-Identifier: Apache-2.0
"""Reference of merge_compact."""

from itertools import chain

import torch

from ems_vllm.ops.paging import gather_entries

# Key, value and score of a class.
_Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def merge_compact(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    paged_scores: torch.Tensor | None,
    weights: torch.Tensor,
    carry: torch.Tensor | None,
    merges_keys: bool,
    mass_keys: torch.Tensor | None,
    block_table: torch.Tensor,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
    class_idx: torch.Tensor,
    budgets: torch.Tensor,
    target_columns: torch.Tensor,
    rows_together: int = 1,
) -> None:
    """See ems_vllm.ops.merge_compact. Runs in float64."""
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
            key, value = _merge(keys, values, weights[at], merges_keys, mass_key, centre, members)
            score = None if carry is None else carry[at][[centre, *members]].double().sum().float()
            found.append((key, value, score))
        return found

    def write(layer: int, row: int, head: int, found: list[_Merged]) -> None:
        block_size, table_row = key_cache.shape[3], block_table[row].tolist()
        for rank, (key, value, score) in enumerate(found):
            block = table_row[int(target_columns[row]) + rank // block_size]
            slot = (layer, block, head, rank % block_size)
            key_cache[slot], value_cache[slot] = key, value
            if paged_scores is not None and score is not None:
                paged_scores[slot] = score

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
    merges_keys: bool,
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
    if weight.sum() <= 0 or (merges_keys and not has_direction):
        return unchanged
    merged_key = norms[0] * direction / direction.norm() if merges_keys else key[0]
    if mass_key is not None:
        mass = (weight.sum() / weight[0]).clamp(max=len(entries)).log()
        merged_key = merged_key + mass * mass_key
    merged_value = weight @ value / weight.sum()
    return merged_key.to(keys.dtype), merged_value.to(values.dtype)
