# SPDX-License-Identifier: Apache-2.0
"""A policy: four components, run in order over the requests that are due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm import ops
from ems_vllm.policies import protection, selection
from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.coverage import held_shares
from ems_vllm.policies.selection import num_members

if TYPE_CHECKING:
    import torch

    from ems_vllm.config.schema import KVCompressionConfig
    from ems_vllm.policies.base import Allocator, Merger, Scorer, Scores, Selector
    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.coverage import Coverage

# What is alive after scoring, in tensors of the shape of a score: weights, carry, mass, and at most
# as much for each of kept_idx and merge_idx.
_SELECTION_TENSORS = 5
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
        num_merged = self.merger.num_merge_tensors + (_MASS_TENSORS if self._keeps_mass else 0)
        num_tensors = max(
            self.scorer.num_score_tensors,
            _DEALING_TENSORS if self.allocator.deals_by_scores else 0,
            # Entries are ranked before classes are made of them.
            _SELECTION_TENSORS + max(self.selector.num_rank_tensors, num_merged),
        )
        num_masks = _PROTECTION_MASKS if protects else 0
        return (4 * num_tensors + num_masks) * num_kv_heads + _ROW_BYTES

    @property
    def _keeps_mass(self) -> bool:
        return self.merger.keeps_mass and self.scorer.uses_window

    def _scratch_bytes(self, protects: bool) -> int:
        takes_slices = self._keeps_mass or protects or self.coverage is not None
        return max(
            self.scorer.scratch_bytes,
            self.selector.scratch_bytes,
            self.merger.scratch_bytes,
            SLICE_BYTES if takes_slices else 0,
        )

    def compact(self, context: CompactionContext) -> torch.Tensor:
        """Write the kept and merged entries of every row into its target columns, in place.

        Returns:
            kept_idx: See Selection.
        """
        return self.place(context, self.score(context))

    def score(self, context: CompactionContext) -> Scores:
        """The first half of `compact`; does not depend on budgets, nor on where entries go."""
        return self.scorer.score(context)

    def held_shares(self, context: CompactionContext, scores: Scores) -> torch.Tensor:
        """What a coverage goes by: see coverage.held_shares."""
        return held_shares(context, self.selector.rank(context, scores), scores.compared)

    def place(self, context: CompactionContext, scores: Scores) -> torch.Tensor:
        """The second half of `compact`."""
        ranked = protection.raised(context, self.selector.rank(context, scores))
        selected = selection.select(context, ranked, self.merger)
        del ranked
        found = self.merger.classify(context, scores, selected)
        classes = protection.open_classes(context, selected, found)
        if context.num_merged is not None:
            context.num_merged.add_(num_members(context, selected, classes))
        carries = scores.carry is not None
        attention = scores.weights if scores.mass is None else scores.mass
        ops.merge_compact(
            context.key_cache,
            context.value_cache,
            context.accumulated_pages if carries else None,
            attention if classes.weights is None else classes.weights,
            scores.carry,
            self.merger.key_merge,
            self.merger.sums_values,
            context.mass_keys() if self._keeps_mass else None,
            context.block_table,
            selected.kept_idx,
            selected.merge_idx,
            classes.class_idx,
            context.budgets,
            context.target_columns,
            context.rows_together,
        )
        return selected.kept_idx
