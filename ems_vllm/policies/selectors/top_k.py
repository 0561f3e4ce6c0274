# SPDX-License-Identifier: Apache-2.0
"""The highest scores, per kv_head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm import ops
from ems_vllm.policies.base import SELECTORS, Selection, Selector

if TYPE_CHECKING:
    from ems_vllm.policies.base import Merger, Scores
    from ems_vllm.policies.context import CompactionContext


@SELECTORS.register("top_k")
class TopKSelector(Selector):
    """Keeps the sinks and the highest scores of each kv_head; the next best may be merged.

    Entries keep their order, so the sinks stay the first entries of every later compression.
    """

    def select(self, context: CompactionContext, scores: Scores, merger: Merger) -> Selection:
        per_center = merger.candidates_per_center
        merge_limits = torch.minimum(
            context.budgets * per_center, context.num_entries - context.budgets
        )
        max_candidates = min(context.max_budget * per_center, context.max_entries)
        shape = scores.weights.shape[:-1]
        kept_idx = scores.weights.new_empty((*shape, context.max_budget), dtype=torch.int32)
        merge_idx = scores.weights.new_empty((*shape, max_candidates), dtype=torch.int32)
        ops.select_entries(
            scores.weights,
            context.num_entries,
            context.budgets,
            context.num_protected,
            merge_limits,
            merger.mass_limit,
            kept_idx,
            merge_idx,
        )
        return Selection(kept_idx, merge_idx)
