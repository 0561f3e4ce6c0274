# SPDX-License-Identifier: Apache-2.0
"""Paged caches and block tables in the memory layouts that attention backends use."""

from dataclasses import dataclass

import torch

# Where a table has no block of the row. Reading the cache there would fault.
NO_BLOCK = 2**30
LAYOUTS = ("separate", "interleaved", "slots_first")


@dataclass
class PagedCache:
    """Random K and V in scattered blocks, NaN in every slot that no row owns.

    Attributes:
        key, value: [num_layers, num_blocks, num_kv_heads, block_size, head_size] views.
        block_table: [num_rows, num_columns], int32; NO_BLOCK where a row has no block.
        storage: what key and value are views of.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    storage: tuple[torch.Tensor, ...]

    @property
    def block_size(self) -> int:
        return self.key.shape[3]

    def clone(self) -> "PagedCache":
        """The same contents in the same memory layout."""
        storage = tuple(tensor.clone() for tensor in self.storage)
        views = [
            copy.as_strided(view.size(), view.stride(), view.storage_offset())
            for view, copy in ((self.key, storage[0]), (self.value, storage[-1]))
        ]
        return PagedCache(*views, self.block_table.clone(), storage)

    def to_float8(self) -> "PagedCache":
        """The same in float8_e4m3fn, in the same memory layout."""
        storage = tuple(tensor.to(torch.float8_e4m3fn) for tensor in self.storage)
        views = [
            copy.as_strided(view.size(), view.stride(), view.storage_offset())
            for view, copy in ((self.key, storage[0]), (self.value, storage[-1]))
        ]
        return PagedCache(*views, self.block_table.clone(), storage)


def int_tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def scattered_table(num_columns: list[int], width: int, num_blocks: int) -> torch.Tensor:
    """A table [num_rows, width] that deals out distinct random blocks.

    Never block 0, which vLLM deals to nobody: where the CUDA kernels read something that is not
    used, it is there, and NaN in a paged_cache.
    """
    table = torch.full((len(num_columns), width), NO_BLOCK, dtype=torch.int32)
    blocks = torch.randperm(num_blocks - 1, dtype=torch.int32) + 1
    first = 0
    for row, count in enumerate(num_columns):
        table[row, :count] = blocks[first : first + count]
        first += count
    return table


def paged_cache(
    lens: list[int],
    *,
    num_layers: int = 1,
    num_kv_heads: int = 2,
    block_size: int = 16,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    layout: str = "separate",
) -> PagedCache:
    """A cache whose row r holds lens[r] entries."""
    num_columns = [-(-length // block_size) for length in lens]
    num_blocks = sum(num_columns) + 2
    table = scattered_table(num_columns, max([*num_columns, 1]) + 1, num_blocks)
    heads_and_slots = [num_kv_heads, block_size]
    if layout == "slots_first":
        heads_and_slots.reverse()
    content = 2 * head_size if layout == "interleaved" else head_size
    shape = [num_layers, num_blocks, *heads_and_slots, content]
    storage = tuple(
        torch.full(shape, float("nan"), dtype=dtype)
        for _ in range(1 if layout == "interleaved" else 2)
    )
    if layout == "interleaved":
        key, value = storage[0].split(head_size, dim=-1)
    else:
        key, value = storage
    if layout == "slots_first":
        key, value = key.transpose(2, 3), value.transpose(2, 3)
    for row, length in enumerate(lens):
        entries = torch.arange(length)
        blocks, offsets = table[row, entries // block_size].long(), entries % block_size
        for cache in (key, value):
            # Every kv_head has a direction of its own, so that cosines are not all near 0.
            content = torch.randn(num_layers, length, num_kv_heads, head_size) + 0.5
            cache[:, blocks, :, offsets] = content.transpose(0, 1).to(dtype)
    return PagedCache(key, value, table, storage)


def rows_written(
    table: torch.Tensor, starts: list[int], ends: list[int], num_blocks: int, block_size: int
) -> torch.Tensor:
    """Mask [num_blocks, 1, block_size] of the slots that entries starts[r]..ends[r]-1 lie in."""
    mask = torch.zeros(num_blocks, 1, block_size, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        entries = torch.arange(start, end)
        mask[table[row, entries // block_size].long(), 0, entries % block_size] = True
    return mask
