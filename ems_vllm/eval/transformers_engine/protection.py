# SPDX-License-Identifier: Apache-2.0
"""Which entries of a level's layers stand for protected positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.spans import Span


class ProtectedPositions:
    """Follows the position of every entry from compaction to compaction.

    Where nothing is protected, nothing is followed.

    Args:
        spans: Of positions that stay as they are, in order and apart.
        num_kv_heads: Of a layer.
    """

    def __init__(self, spans: Sequence[Span], num_kv_heads: int) -> None:
        self._spans = spans
        self._num_kv_heads = num_kv_heads
        # By layer and head, the position of every kept entry.
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def held(self, layer: int, start: int, stop: int) -> list[torch.Tensor]:
        """By head, the position of every entry that a compaction sees.

        Args:
            layer: Index in the level.
            start, stop: Positions of the entries behind those that were kept.
        """
        if not self._spans:
            return []
        new = torch.arange(start, stop)
        none = new[:0]
        return [
            torch.cat([self._kept.get((layer, head), none), new])
            for head in range(self._num_kv_heads)
        ]

    def keep(self, layer: int, held: Sequence[torch.Tensor], kept_idx: torch.Tensor) -> None:
        """Remember which entries a layer keeps.

        Args:
            layer: Index in the level.
            held: Of `held`.
            kept_idx: [num_kv_heads, most entries of a head]; see Selection.
        """
        for head, (of_head, kept) in enumerate(zip(held, kept_idx.cpu(), strict=True)):
            self._kept[layer, head] = of_head[kept[kept >= 0].long()]

    def protect(
        self, context: CompactionContext, held: Sequence[Sequence[torch.Tensor]]
    ) -> CompactionContext:
        """A context that protects what the request does.

        Args:
            context: Of the compaction.
            held: By layer, of `held`.
        """
        if not self._spans:
            return context
        mask = torch.zeros((len(held), len(held[0]), context.max_entries), dtype=torch.bool)
        for of_layer, in_layer in zip(mask, held, strict=True):
            for row, positions in zip(of_layer, in_layer, strict=True):
                for start, stop in self._spans:
                    row[: len(positions)] |= (positions >= start) & (positions < stop)
        # Heads are heads of one row, or rows.
        shape = (len(held), context.num_rows, context.num_kv_heads, context.max_entries)
        return replace(context, is_protected=mask.view(shape).to(context.device))
