# SPDX-License-Identifier: Apache-2.0
"""Entries of a paged cache as plain tensors, a slice of them at a time.

For what no operator of `ems_vllm.ops` computes. It costs a copy in float32 of every entry that is
read, so methods that a server runs all day have operators instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.context import SLICE_BYTES, slices

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext


@dataclass(frozen=True)
class Part:
    """Some layers and rows of a context.

    Attributes:
        context: That it is part of.
        layers, rows: Its place in scores.
        step: Entries that are read at a time.
    """

    context: CompactionContext
    layers: slice
    rows: slice
    step: int

    @property
    def place(self) -> tuple[slice, slice]:
        return self.layers, self.rows

    def keys(self, at: slice, offsets: Tensor | None = None) -> Tensor:
        """[layers, rows, num_kv_heads, entries, head_size], float32; see `vectors`."""
        keys = self.vectors(self.context.key_cache, at, offsets)
        scales = self.context.key_scales
        return keys if scales is None else keys.mul_(scales[self.layers, None, None, None, None])

    def values(self, at: slice, offsets: Tensor | None = None) -> Tensor:
        """Like keys, but as stored."""
        return self.vectors(self.context.value_cache, at, offsets)

    def vectors(self, cache: Tensor, at: slice, offsets: Tensor | None = None) -> Tensor:
        """Entries as stored, in float32; 0 beyond a row's live ones.

        Args:
            cache: One of the context's.
            at: Which entries.
            offsets: [num_rows] of the context, int32, or None for 0 - what `at` counts from.
        """
        context = self.context
        entry = torch.arange(at.start, at.stop, device=context.device)[None]
        if offsets is not None:
            entry = entry + offsets[self.rows, None]
        table = context.block_table[self.rows].long()
        column = (entry // context.block_size).clamp(max=table.shape[1] - 1)
        blocks = table.gather(1, column.expand(len(table), -1))
        # Advanced indices come first: [rows, entries, layers, num_kv_heads, head_size].
        found = cache[self.layers][:, blocks, :, entry % context.block_size].permute(2, 0, 3, 1, 4)
        found = found.to(torch.float32, memory_format=torch.contiguous_format)
        is_live = entry < context.num_live[self.rows, None]
        # No product: what lies behind the live entries may hold anything, NaN included.
        return found.masked_fill_(~is_live[:, None, :, None], 0.0)

    def vectors_at(self, cache: Tensor, index: Tensor) -> Tensor:
        """Entries of each kv_head, wherever they lie, as stored, in float32.

        Args:
            cache: One of the context's.
            index: [layers, rows, num_kv_heads, n], integers, of live entries.

        Returns:
            [layers, rows, num_kv_heads, n, head_size].
        """
        context, index = self.context, index.long()
        table = context.block_table[self.rows].long()[None, :, None]
        table = table.expand(*index.shape[:-1], -1)
        blocks = table.gather(-1, index // context.block_size)
        heads = torch.arange(context.num_kv_heads, device=context.device)[:, None]
        layers = torch.arange(context.num_layers, device=context.device)[self.layers]
        at = (layers[:, None, None, None], blocks, heads, index % context.block_size)
        return cache[at].float()

    def entries(self) -> Iterator[slice]:
        """All entries to choose from, `step` at a time."""
        return self.steps(slice(0, self.context.max_entries))

    def live(self) -> Iterator[slice]:
        """The tail as well."""
        return self.steps(slice(0, self.context.block_table.shape[1] * self.context.block_size))

    def steps(self, run: slice) -> Iterator[slice]:
        """Consecutive entries, `step` at a time."""
        for start in range(run.start, run.stop, self.step):
            yield slice(start, min(start + self.step, run.stop))


def parts(
    context: CompactionContext,
    floats_per_entry: int,
    *,
    floats_per_row: int = 0,
    layers: range | None = None,
    multiple: int = 1,
) -> list[Part]:
    """Layers and rows, so many at a time that what is made of them fits SLICE_BYTES.

    Args:
        context: To be divided.
        floats_per_entry: What is made at a time of an entry of one layer, of all its kv_heads, in
            float32.
        floats_per_row: The same of a row of one layer, whatever its length.
        layers: Which; all where None.
        multiple: Of which `step` is one.
    """
    longest = context.block_table.shape[1] * context.block_size
    fitting = SLICE_BYTES // 4
    step = max(1, (fitting - floats_per_row) // floats_per_entry)
    step = max(multiple, min(step // multiple, -(-longest // multiple)) * multiple)
    at_once = max(1, fitting // (longest * floats_per_entry + floats_per_row))
    found = slices(layers or range(context.num_layers), context.num_rows, at_once)
    return [Part(context, *pair, step) for pair in found]


def softmax_over(
    steps: Iterator[slice], logits: Callable[[slice], Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Softmax over entries that are there a step at a time.

    Args:
        steps: All entries that it runs over.
        logits: [..., entries] of some of them, -inf for those that do not count; computed twice
            where there are several steps.
    """
    total, last, all_steps = None, None, list(steps)
    for at in all_steps:
        last = logits(at)
        part = last.logsumexp(-1, keepdim=True)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    assert last is not None
    for at in all_steps:
        numbers = last if len(all_steps) == 1 else logits(at)
        yield at, numbers.sub_(total).exp_()
