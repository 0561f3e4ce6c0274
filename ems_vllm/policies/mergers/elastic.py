# SPDX-License-Identifier: Apache-2.0
"""Everything joins what is kept nearest to it, as in Elastic Cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.averaging import AveragingMerger
from ems_vllm.policies.base import MERGERS, Classes
from ems_vllm.policies.centres import class_or_zero, entry_of, entry_weights, neighbours
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("elastic")
class ElasticMerger(AveragingMerger):
    """Averages keys and values of every dropped entry into the kept entry nearest in the text.

    Paper: Liu et al. 2024, Elastic Cache, arXiv:2407.18121. Ours: sinks take no members, so an
    entry next to them joins the first entry behind; of two that are as near, the later one. The
    paper's decoding, which drops the entry at a fixed distance, is `recompress_interval` here.
    """

    papers = (Paper("Elastic Cache", "Liu et al.", 2024, "2407.18121"),)

    @property
    def num_merge_tensors(self) -> int:
        return 14

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        found = neighbours(context, selection)
        merged = selection.merge_idx
        to_before = merged - entry_of(selection, found.before)
        to_after = entry_of(selection, found.after) - merged
        is_before = found.has_before & (~found.has_after | (to_before < to_after))
        del to_before, to_after
        rank = torch.where(is_before, found.before, found.after)
        class_idx = class_or_zero(context, rank, found.has_before | found.has_after)
        ones = torch.ones_like(merged, dtype=torch.float32)
        return Classes(class_idx, entry_weights(context, selection, ones))
