# SPDX-License-Identifier: Apache-2.0
"""A policy: four components, run in order over the requests that are due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm import ops
from ems_vllm.policies import protection
from ems_vllm.policies.context import SLICE_BYTES

if TYPE_CHECKING:
    import torch

    from ems_vllm.config.schema import KVCompressionConfig
    from ems_vllm.policies.base import Allocator, Merger, Scorer, Scores, Selector
    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.coverage import Coverage

# What is alive after scoring, in tensors of the shape of a score: weights, carry, mass, and at most
# as much for each of kept_idx, merge_idx and class_idx.
_SELECTION_TENSORS = 6
# The same where scores are dealt by, before anything is selected: weights, carry, mass, what is
# ranked, and its best with their places as int64.
_DEALING_TENSORS = 7
# What keys that keep mass are worth in such tensors, one key of at most 256 numbers for the entries
# of a row, of which there are 32 at least: two blocks of 16.
_MASS_TENSORS = 8
# Masks of a byte for each score: what is protected, what is eligible, and what is made of them.
_PROTECTION_MASKS = 4
# Per entry of a row, whatever the number of kv_heads: masks, ranks, and the block table's columns.
_ROW_BYTES = 16


@dataclass(frozen=True)
class Policy:
    """The composition Scorer x Allocator x Selector x Merger.

    Attributes:
        coverage: By what share of the score fewer entries stay than the allocator allows; None for
            as many as it does.
    """

    scorer: Scorer
    allocator: Allocator
    selector: Selector
    merger: Merger
    coverage: Coverage | None = None

    @classmethod
    def from_config(cls, config: KVCompressionConfig) -> Policy:
        return cls(config.scorer, config.allocator, config.selector, config.merger, config.covered)

    def workspace_bytes(
        self, num_entries: int, num_kv_heads: int, *, protects: bool = False
    ) -> int:
        """Bound of what a compaction allocates, scratch memory inside of operators not counted.

        Args:
            num_entries: num_layers * num_rows * max_entries of the context.
            num_kv_heads: Of a layer, on this rank.
            protects: Whether entries are protected.
        """
        return self._scratch_bytes(protects) + num_entries * self._bytes_per_entry(
            num_kv_heads, protects
        )

    def max_entries(
        self, workspace_bytes: int, num_kv_heads: int, *, protects: bool = False
    ) -> int:
        """The most entries that need no more than `workspace_bytes`; 0 where none fits."""
        left = max(0, workspace_bytes - self._scratch_bytes(protects))
        return left // self._bytes_per_entry(num_kv_heads, protects)

    def _bytes_per_entry(self, num_kv_heads: int, protects: bool) -> int:
        num_selected = _SELECTION_TENSORS + (_MASS_TENSORS if self._keeps_mass else 0)
        num_dealing = _DEALING_TENSORS if self.allocator.deals_by_scores else 0
        num_tensors = max(self.scorer.num_score_tensors, num_dealing, num_selected)
        num_masks = _PROTECTION_MASKS if protects else 0
        return (4 * num_tensors + num_masks) * num_kv_heads + _ROW_BYTES

    @property
    def _keeps_mass(self) -> bool:
        return self.merger.keeps_mass and self.scorer.uses_window

    def _scratch_bytes(self, protects: bool) -> int:
        takes_slices = self._keeps_mass or protects or self.coverage is not None
        return max(self.scorer.scratch_bytes, SLICE_BYTES if takes_slices else 0)

    def compact(self, context: CompactionContext) -> torch.Tensor:
        """Write the kept and merged entries of every row into its target columns, in place.

        Returns:
            kept_idx: See Selection.
        """
        return self.place(context, self.score(context))

    def score(self, context: CompactionContext) -> Scores:
        """The first half of `compact`; does not depend on budgets, nor on where entries go."""
        return self.scorer.score(context)

    def place(self, context: CompactionContext, scores: Scores) -> torch.Tensor:
        """The second half of `compact`."""
        selection = protection.select(context, scores, self.selector, self.merger)
        class_idx = protection.assign(context, selection, self.merger)
        carries = scores.carry is not None
        ops.merge_compact(
            context.key_cache,
            context.value_cache,
            context.accumulated_pages if carries else None,
            scores.weights if scores.mass is None else scores.mass,
            scores.carry,
            self.merger.merges_keys,
            context.mass_keys() if self._keeps_mass else None,
            context.block_table,
            selection.kept_idx,
            selection.merge_idx,
            class_idx,
            context.budgets,
            context.target_columns,
            context.rows_together,
        )
        return selection.kept_idx
