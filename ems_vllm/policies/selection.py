# SPDX-License-Identifier: Apache-2.0
"""From an order of entries to those that stay and those that may be merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm import ops
from ems_vllm.policies.base import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Classes, Merger
    from ems_vllm.policies.context import CompactionContext


def select(context: CompactionContext, ranked: Tensor, merger: Merger) -> Selection:
    """Select `context.budgets` entries of each kv_head: the sinks, and the highest.

    Args:
        ranked: Of Selector.rank.
        merger: Says how many of the others are candidates, which are the next best.
    """
    per_center = merger.candidates_per_center
    rest = context.num_entries - context.budgets
    limits, max_candidates = rest, context.max_entries
    if per_center is not None:
        limits = rest.minimum(context.budgets * per_center)
        max_candidates = min(max_candidates, context.max_budget * per_center)
    shape = ranked.shape[:-1]
    kept_idx = context.num_entries.new_empty((*shape, context.max_budget))
    merge_idx = context.num_entries.new_empty((*shape, max_candidates))
    ops.select_entries(
        ranked,
        context.num_entries,
        context.budgets,
        context.num_protected,
        limits,
        merger.mass_limit,
        kept_idx,
        merge_idx,
    )
    return Selection(kept_idx, merge_idx)


def num_members(context: CompactionContext, selection: Selection, classes: Classes) -> Tensor:
    """[], int64: how many candidates a kept entry takes, of all rows and kv_heads."""
    joins = classes.class_idx < context.budgets[:, None, None]
    return joins.logical_and_(selection.merge_idx >= 0).sum()


def best(
    context: CompactionContext, weights: Tensor, counts: Tensor, before: Tensor | None = None
) -> Tensor:
    """Like weights, bool: the highest ones.

    Args:
        counts: [num_rows], int32 - how many of a row.
        before: [num_rows], int32, or None for num_entries - entries among which they are.
    """
    kept_idx = counts.new_empty((*weights.shape[:-1], context.max_budget))
    num_entries = context.num_entries if before is None else before
    none = torch.zeros_like(counts)
    counts = counts.minimum(num_entries)
    ops.select_entries(weights, num_entries, counts, none, none, 1.0, kept_idx, kept_idx[..., :0])
    found = torch.zeros_like(weights, dtype=torch.int32)
    is_kept = (kept_idx >= 0).int()
    return found.scatter_reduce_(-1, kept_idx.clamp_(min=0).long(), is_kept, "amax").bool()
