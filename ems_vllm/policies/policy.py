# SPDX-License-Identifier: Apache-2.0
"""A policy: four components, run in order over the requests that are due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm import ops

if TYPE_CHECKING:
    from ems_vllm.config.schema import KVCompressionConfig
    from ems_vllm.policies.base import BudgetAllocator, Merger, Scorer, Selector
    from ems_vllm.policies.context import CompactionContext


@dataclass(frozen=True)
class Policy:
    """The composition Scorer x BudgetAllocator x Selector x Merger."""

    scorer: Scorer
    allocator: BudgetAllocator
    selector: Selector
    merger: Merger

    @classmethod
    def from_config(cls, config: KVCompressionConfig) -> Policy:
        return cls(config.scorer, config.allocator, config.selector, config.merger)

    def compact(self, context: CompactionContext) -> None:
        """Write the kept and merged entries of every row into its target columns, in place."""
        scores = self.scorer.score(context)
        selection = self.selector.select(context, scores, self.merger)
        class_idx = self.merger.assign(context, selection)
        carries = scores.carry is not None
        ops.merge_compact(
            context.key_cache,
            context.value_cache,
            context.paged_scores if carries else None,
            scores.weights,
            scores.carry,
            context.block_table,
            selection.kept_idx,
            selection.merge_idx,
            class_idx,
            context.budgets,
            context.target_columns,
        )
