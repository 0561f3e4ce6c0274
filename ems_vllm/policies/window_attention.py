# SPDX-License-Identifier: Apache-2.0
"""Attention of the recorded queries one by one, where its sum or peak does not do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.base import Scorer
from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.reading import Part, parts, softmax_over

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# Of probabilities: the mask, what is made of them, and what callers make of that.
_TENSORS = 5


@dataclass(frozen=True)
class WindowAttention:
    """Of some layers and rows.

    Attributes:
        part: Which.
        queries: [layers, rows, num_kv_heads, group, obs_window, head_size], float32; 0 in slots
            that record nothing.
        ages: [rows, obs_window], int32 - 0 is the newest.
        is_recorded: [rows, obs_window], bool.
    """

    part: Part
    queries: Tensor
    ages: Tensor
    is_recorded: Tensor

    @property
    def positions(self) -> Tensor:
        """[rows, obs_window], int32: of the queries."""
        return self.part.context.end_positions[self.part.rows, None] - 1 - self.ages

    @property
    def count(self) -> Tensor:
        """[rows], int32: recorded queries, at least 1."""
        return self.part.context.num_queries[self.part.rows].clamp(min=1)

    def attention(self, *, of_entries: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Softmax of each query over all that it sees: entries and the tail.

        Args:
            of_entries: Leave out what no row chooses from.

        Yields:
            Live entries, and [layers, rows, num_kv_heads, group, obs_window, entries]; 0 of slots
            that record nothing.
        """
        end = self.part.context.max_entries
        unrecorded = ~self.is_recorded[None, :, None, None, :, None]
        for at, probabilities in softmax_over(self.part.live(), self.logits):
            probabilities.masked_fill_(unrecorded, 0.0)
            if not of_entries or at.stop <= end:
                yield at, probabilities
            elif at.start < end:
                yield slice(at.start, end), probabilities[..., : end - at.start]

    def logits(self, at: slice) -> Tensor:
        """Like `attention`, before the softmax; -inf of what a query does not see."""
        context = self.part.context
        keys = self.part.keys(at)[:, :, :, None]
        logits = (self.queries @ keys.transpose(-1, -2)).mul_(context.scale)
        entry = torch.arange(at.start, at.stop, device=context.device)
        sees = context.num_live[self.part.rows, None] - self.ages
        is_hidden = entry >= sees[..., None]
        return logits.masked_fill_(is_hidden[None, :, None, None], -torch.inf)


def window_attention(
    context: CompactionContext,
    *,
    floats_per_entry: int = 0,
    floats_per_row: int = 0,
    layers: range | None = None,
) -> Iterator[WindowAttention]:
    """Recorded queries, some layers and rows at a time.

    Args:
        context: Of a scorer with `uses_window`.
        floats_per_entry: What the caller makes of an entry of one layer, beside a few tensors of
            the shape of the attention.
        floats_per_row: The same of a row of one layer.
        layers: Which; all where None.
    """
    assert context.query_ring is not None
    _, _, window, num_heads, head_size = context.query_ring.shape
    of_entry = context.num_kv_heads * head_size * 3 + num_heads * window * _TENSORS
    of_row = 4 * window * num_heads * head_size + floats_per_row
    slots = torch.arange(window, dtype=torch.int32, device=context.device)
    of_entry += floats_per_entry
    for part in parts(context, of_entry, floats_per_row=of_row, layers=layers):
        ages = (context.end_positions[part.rows, None] - 1 - slots) % window
        is_recorded = ages < context.num_queries[part.rows, None]
        queries = context.query_ring[part.layers, context.ring_rows[part.rows].long()].float()
        # No product: a slot that records nothing may hold anything, NaN included.
        queries = queries.masked_fill_(~is_recorded[None, :, :, None, None], 0.0)
        # [layers, rows, obs_window, num_kv_heads, group, head_size]
        queries = queries.unflatten(3, (context.num_kv_heads, -1))
        yield WindowAttention(part, queries.permute(0, 1, 3, 4, 2, 5), ages, is_recorded)


class WindowScorer(Scorer):
    """A scorer that looks at recorded queries one by one, by `window_attention`."""

    @property
    def uses_window(self) -> bool:
        return True

    @property
    def scratch_bytes(self) -> int:
        return SLICE_BYTES
