# SPDX-License-Identifier: Apache-2.0
"""Values of dropped entries are added to the next kept one, as in CaM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.base import MERGERS, Classes, Merger
from ems_vllm.policies.centres import class_or_zero, entry_weights, neighbours
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext

# Below any attention that counts.
_EPS = 1e-30


@MERGERS.register("cam")
class CaMMerger(Merger):
    """Adds the value of a dropped entry to the next kept one, as much as it is attended to.

    Paper: Zhang et al. 2024, CaM, ICML: keys are dropped, and a value is added with the probability

        p = attention of the entry / mean attention of the entries that stay, at most 1

    Deviations: the expectation, p times the value, instead of a draw, so that answers do not depend
    on chance; all of it to the next kept entry, where the paper divides it among the next m; the
    mean is that of all entries that stay.
    """

    papers = (Paper("CaM", "Zhang et al.", 2024, venue="ICML 2024"),)

    @property
    def candidates_per_center(self) -> None:
        return None

    @property
    def sums_values(self) -> bool:
        return True

    @property
    def num_merge_tensors(self) -> int:
        return 12

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        attention = scores.compared
        kept, merged = selection.kept_idx, selection.merge_idx
        is_kept = kept >= 0
        of_kept = attention.gather(-1, kept.clamp(min=0).long()).masked_fill_(~is_kept, 0.0)
        mean = of_kept.sum(-1, keepdim=True) / is_kept.sum(-1, keepdim=True).clamp_(min=1)
        of_merged = attention.gather(-1, merged.clamp(min=0).long())
        weights = of_merged.div_(mean.clamp_(min=_EPS)).clamp_(max=1.0)
        weights = entry_weights(context, selection, weights)
        found = neighbours(context, selection)
        return Classes(class_or_zero(context, found.after, found.has_after), weights)
