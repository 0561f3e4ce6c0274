# SPDX-License-Identifier: Apache-2.0
"""Entries of a request that stay as they are, wherever they lie: selection and merging obey (ours).

Sinks are the leading entries and known to the operators by their number. Other entries that were
asked for lie anywhere, and in another place for every kv_head once it was compressed; so they are
a mask, and what the operators are given is changed around them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.context import SLICE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Classes, Selection
    from ems_vllm.policies.context import CompactionContext

# Below any score that is not 0, and not so small that a device takes it for 0.
_TINY = torch.finfo(torch.float32).tiny
# Of an entry while members of a protected one are sought: an int32 and an int64 place, and masks.
_BYTES_EACH = 16


def raised(context: CompactionContext, ranked: Tensor) -> Tensor:
    """What a selector ranks by, with protected entries above all others of their kv_head.

    A budget that holds all of them, and the sinks, keeps them all: the caller sees to that. A
    merger's `mass_limit` counts them as what they are raised to.
    """
    if context.is_protected is None:
        return ranked
    highest = ranked.amax(-1, keepdim=True).clamp_(min=_TINY)
    above = torch.nextafter(highest, torch.full_like(highest, torch.inf))
    return torch.where(context.is_protected, above, ranked)


def open_classes(context: CompactionContext, selection: Selection, classes: Classes) -> Classes:
    """What a merger found, but nothing joins a protected entry: that goes to the zero class.

    Args:
        classes: Its class_idx is changed in place.
    """
    is_protected, kept_idx, class_idx = context.is_protected, selection.kept_idx, classes.class_idx
    num_members, num_centres = class_idx.shape[-1], kept_idx.shape[-1]
    if is_protected is None or num_members == 0:
        return classes
    zero_class = context.budgets[None, :, None, None].expand(*class_idx.shape[:-1], 1)
    rows = [each.flatten(0, 2) for each in (is_protected, kept_idx, class_idx, zero_class)]
    # Places are int64, which is as much again as all that is alive here.
    step = max(1, SLICE_BYTES // (_BYTES_EACH * max(num_members, num_centres)))
    for mask, kept, found, zero in zip(*(each.split(step) for each in rows), strict=True):
        is_closed = kept_of(mask, kept)
        # The zero class is no centre, and may be one more than there are.
        is_closed = is_closed.gather(-1, found.clamp(max=num_centres - 1).long())
        found.copy_(torch.where(is_closed, zero, found))
    return classes


def kept_of(is_protected: Tensor, kept_idx: Tensor) -> Tensor:
    """Which of the entries that stay are protected.

    Args:
        is_protected: [..., max_entries], bool.
        kept_idx: [..., max_budget], int32 - see Selection.

    Returns:
        Shape of kept_idx, bool; False where there is no entry.
    """
    found = is_protected.gather(-1, kept_idx.clamp(min=0).long())
    return found.logical_and_(kept_idx >= 0)
