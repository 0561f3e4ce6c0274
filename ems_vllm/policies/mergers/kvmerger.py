# SPDX-License-Identifier: Apache-2.0
"""Neighbours that are alike merge, weighted by a Gaussian kernel, as in KVMerger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm.policies.adjacent import similarity_to_next
from ems_vllm.policies.averaging import AveragingMerger
from ems_vllm.policies.base import MERGERS, Classes
from ems_vllm.policies.centres import class_or_zero, entry_of, entry_weights, neighbours
from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.reading import parts

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("kvmerger")
class KVMergerMerger(AveragingMerger):
    """Merges a dropped entry into a kept one if all keys from one to the other are alike.

    Paper: Wang et al. 2024, KVMerger, arXiv:2407.08454: sets of consecutive entries, each more
    similar to the next than `similar`, merge into the one with the highest score, the pivot p:

        weight of entry i = exp(-|k_p - k_i|^2 / (2 sigma^2))

    Here the pivots are the entries that are kept (`selector: similar_sets` keeps the highest score
    of each set), of a set with several kept entries the one before or after, whichever key is
    nearer, and entries of sets without a kept one are dropped. Deviations: a value is the weighted
    mean, where the paper multiplies it by the size of the set, which leaves the softmax's sum as it
    was; `keep_mass` (ours) gives attention for all instead. All layers merge; the paper leaves out
    the first two and the last.
    """

    papers = (Paper("KVMerger", "Wang et al.", 2024, "2407.08454"),)

    similar: Annotated[float, Field(ge=-1, le=1)] = 0.75
    """Cosine of neighbouring keys above which they belong together."""

    sigma: Annotated[float, Field(gt=0, le=1e4)] = 5.0
    """Width of the kernel, in the unit of keys."""

    @property
    def num_merge_tensors(self) -> int:
        return 18

    @property
    def scratch_bytes(self) -> int:
        return SLICE_BYTES

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        merged = selection.merge_idx
        set_of = _sets(context, self.similar)
        own = set_of.gather(-1, merged.clamp(min=0).long())
        found = neighbours(context, selection)
        best, joins, rank = None, torch.zeros_like(found.has_before), found.before
        for other, exists in ((found.before, found.has_before), (found.after, found.has_after)):
            centre = entry_of(selection, other)
            belongs = exists & (set_of.gather(-1, centre.long()) == own)
            kernel = self._kernel(context, merged, centre).masked_fill_(~belongs, -1.0)
            rank = other if best is None else torch.where(kernel > best, other, rank)
            best = kernel if best is None else torch.maximum(best, kernel)
            joins = joins | belongs
        assert best is not None
        weights = entry_weights(context, selection, best.clamp_(min=0))
        return Classes(class_or_zero(context, rank, joins), weights)

    def _kernel(self, context: CompactionContext, one: Tensor, other: Tensor) -> Tensor:
        """Of the keys of pairs of entries; see mergers.d2o.similarities."""
        found = torch.empty_like(one, dtype=torch.float32)
        scales = context.key_scales
        for part in parts(context, 6 * context.num_kv_heads * context.key_cache.shape[-1]):
            for start in range(0, one.shape[-1], part.step):
                at = (*part.place, slice(None), slice(start, start + part.step))
                first, second = (
                    part.vectors_at(context.key_cache, index[at].clamp(min=0))
                    for index in (one, other)
                )
                distance = (first - second).square_().sum(-1)
                if scales is not None:
                    distance *= scales[part.layers, None, None, None].square()
                found[at] = distance.div_(-2 * self.sigma**2).exp_()
        return found


def _sets(context: CompactionContext, similar: float) -> Tensor:
    """[num_layers, num_rows, num_kv_heads, max_entries], int32: equal within a set."""
    ends = similarity_to_next(context) <= similar
    sets = torch.zeros_like(ends, dtype=torch.int32)
    torch.cumsum(ends[..., :-1], -1, dtype=torch.int32, out=sets[..., 1:])
    return sets
