# SPDX-License-Identifier: Apache-2.0
"""One entry for all that is dropped, as in RazorAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.averaging import AveragingMerger
from ems_vllm.policies.base import MERGERS, Classes
from ems_vllm.policies.centres import class_or_zero, entry_weights
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("compensation")
class CompensationMerger(AveragingMerger):
    """The mean key and value of everything dropped, as one entry that counts for all of it.

    Paper: Tang et al. 2024, RazorAttention, arXiv:2407.15891, its compensation token. It takes the
    place of the kept entry with the lowest score, which is part of it. How often it counts goes to
    its key (`keep_mass`), where the paper multiplies inside of the softmax.
    """

    papers = (Paper("RazorAttention", "Tang et al.", 2024, "2407.15891"),)

    keep_mass: bool = True
    """Let it count as often as it has entries; with scorers that record queries."""

    @property
    def num_merge_tensors(self) -> int:
        return 8

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        kept, merged = selection.kept_idx, selection.merge_idx
        # Sinks and protected entries take no members.
        entry = kept.clamp(min=0).long()
        is_eligible = context.is_eligible.expand_as(scores.weights).gather(-1, entry) & (kept >= 0)
        of_kept = scores.weights.gather(-1, entry).masked_fill_(~is_eligible, torch.inf)
        lowest = of_kept.min(-1, keepdim=True)
        joins = (merged >= 0) & lowest.values.isfinite()
        class_idx = class_or_zero(context, lowest.indices.expand_as(merged), joins)
        ones = torch.ones_like(merged, dtype=torch.float32)
        return Classes(class_idx, entry_weights(context, selection, ones))
