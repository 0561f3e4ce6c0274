# SPDX-License-Identifier: Apache-2.0
"""Evict-then-merge with a zero class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm import ops
from ems_vllm.ops import KeyMerge
from ems_vllm.policies.base import MERGERS, Classes, Merger
from ems_vllm.policies.paper import EMS

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("ems")
class EMSMerger(Merger):
    """Merges redundant candidates into the kept entry they resemble most.

    Paper: Li et al. 2024, arXiv:2412.08521: kept entries are class centres, irrelevant entries are
    evicted first, redundancy is cos(K) * cos(V), and what resembles no centre goes to a zero
    class, so that one scatter serves all heads. Ours: the thresholds and bounds below; negative
    cosines count as 0 (two opposites are not redundant); sinks are not merged into. The merge
    itself is `ops.merge_compact`; a centre without members stays bit-identical.

    The paper's keys merge too, in direction, with the centre's norm (`merge_keys`). Measured
    (docs/defaults.md), that makes attention outputs worse than dropping the members; merging
    values alone changes nothing; merging values and keeping the members' attention mass makes them
    better (ours, `CompactionContext.mass_keys`). The last is the default.
    """

    papers = (EMS,)

    merge_keys: bool = False
    """Merge directions of keys too, weighted by attention, and keep the centre's norm."""

    keep_mass: bool = True
    """Give a merged entry the attention that all its members received (ours); with scorers that
    record queries."""

    similarity_threshold: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Smallest cos(K) * cos(V) that is merged; below it a candidate is dropped."""

    max_candidates_per_center: Annotated[int, Field(ge=1, le=16)] = 2
    """Candidates considered, as a multiple of the budget; the rest is evicted as irrelevant."""

    relevant_mass: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Candidates beyond this fraction of a head's cumulative score are irrelevant."""

    @property
    def candidates_per_center(self) -> int:
        return self.max_candidates_per_center

    @property
    def key_merge(self) -> KeyMerge:
        return KeyMerge.DIRECTION if self.merge_keys else KeyMerge.CENTRE

    @property
    def keeps_mass(self) -> bool:
        return self.keep_mass

    @property
    def mass_limit(self) -> float:
        return self.relevant_mass

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        class_idx = torch.empty_like(selection.merge_idx)
        ops.assign_classes(
            context.key_cache,
            context.value_cache,
            context.block_table,
            selection.kept_idx,
            selection.merge_idx,
            context.budgets,
            context.num_protected,
            self.similarity_threshold,
            class_idx,
        )
        return Classes(class_idx)
