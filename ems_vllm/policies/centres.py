# SPDX-License-Identifier: Apache-2.0
"""Candidates for merging and the kept entries next to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Selection
    from ems_vllm.policies.context import CompactionContext

_NONE = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Neighbours:
    """Kept entries before and after each candidate, in the order of the text.

    Attributes:
        before, after: Shape of Selection.merge_idx, int32 - rank of the kept entry. Of no meaning
            where there is none.
        has_before, has_after: The same, bool: there is one that may take members.
    """

    before: Tensor
    after: Tensor
    has_before: Tensor
    has_after: Tensor


def neighbours(context: CompactionContext, selection: Selection) -> Neighbours:
    """Of every candidate; sinks take no members."""
    kept, merged = selection.kept_idx, selection.merge_idx
    ascending = kept.masked_fill(kept < 0, _NONE)
    after = torch.searchsorted(ascending, merged, out_int32=True)
    before = after - 1
    budgets = context.budgets[:, None, None]
    # Sinks are the leading entries, and the first ones that are kept.
    num_sinks = context.num_protected[:, None, None]
    is_candidate = merged >= 0
    return Neighbours(
        before,
        after,
        (before >= num_sinks) & is_candidate,
        (after < budgets) & (after >= num_sinks) & is_candidate,
    )


def entry_of(selection: Selection, rank: Tensor) -> Tensor:
    """The entry with a rank among those that are kept; entry 0 for a rank that none has."""
    most = selection.kept_idx.shape[-1] - 1
    return selection.kept_idx.gather(-1, rank.clamp(0, most).long()).clamp_(min=0)


def class_or_zero(context: CompactionContext, rank: Tensor, joins: Tensor) -> Tensor:
    """class_idx of Classes: a rank, or the zero class for a candidate that joins none."""
    return torch.where(joins, rank, context.budgets[:, None, None]).int()


def entry_weights(
    context: CompactionContext, selection: Selection, of_candidates: Tensor
) -> Tensor:
    """Weights of Classes, from those of candidates; all other entries, the centres, have 1.

    Args:
        of_candidates: Shape of Selection.merge_idx, float32.
    """
    shape = (*selection.merge_idx.shape[:-1], context.max_entries + 1)
    weights = of_candidates.new_ones(shape)
    # Where there is no candidate, behind the entries.
    index = selection.merge_idx
    index = torch.where(index >= 0, index, context.max_entries).long()
    return weights.scatter_(-1, index, of_candidates)[..., :-1].contiguous()
