# SPDX-License-Identifier: Apache-2.0
"""Similar keys and values are merged, others dropped, as in D2O."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from ems_vllm.policies.averaging import AveragingMerger
from ems_vllm.policies.base import MERGERS, Classes
from ems_vllm.policies.centres import class_or_zero, entry_of, entry_weights
from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.mergers.clusters import nearest_key
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.reading import parts

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("d2o")
class D2OMerger(AveragingMerger):
    """Merges a dropped entry into the kept one with the most similar key, weighted by the cosine.

    Paper: Wan et al. 2024, D2O, arXiv:2406.13035: what is less similar than dropped entries are on
    the mean is not merged. Deviations: the mean is that of this compaction and of the kv_head,
    where the paper averages it over steps and a layer; classes are weighted means, where public
    code divides by the number of entries, which shortens keys. Its layer budgets, by the variance
    of attention, are not served: `allocator: profile` stands in for them.
    """

    papers = (Paper("D2O", "Wan et al.", 2024, "2406.13035"),)

    @property
    def num_merge_tensors(self) -> int:
        return 12

    @property
    def scratch_bytes(self) -> int:
        return SLICE_BYTES

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        class_idx = nearest_key(context, selection, 0.0)
        joins = (class_idx < context.budgets[:, None, None]) & (selection.merge_idx >= 0)
        centres = entry_of(selection, class_idx)
        similarity = similarities(context, selection.merge_idx, centres).masked_fill_(~joins, 0.0)
        count = joins.sum(-1, keepdim=True).clamp_(min=1)
        joins &= similarity >= similarity.sum(-1, keepdim=True) / count
        weights = entry_weights(context, selection, similarity.clamp_(min=0))
        return Classes(class_or_zero(context, class_idx, joins), weights)


def similarities(context: CompactionContext, one: Tensor, other: Tensor) -> Tensor:
    """Cosines of the keys of pairs of entries.

    Args:
        one, other: [num_layers, num_rows, num_kv_heads, n], int32; anything below 0 is entry 0.

    Returns:
        The same shape, float32.
    """
    found = torch.empty_like(one, dtype=torch.float32)
    for part in parts(context, 6 * context.num_kv_heads * context.key_cache.shape[-1]):
        for start in range(0, one.shape[-1], part.step):
            at = (*part.place, slice(None), slice(start, start + part.step))
            first, second = (
                part.vectors_at(context.key_cache, index[at].clamp(min=0)) for index in (one, other)
            )
            found[at] = cosine_similarity(first, second, dim=-1)
    return found
