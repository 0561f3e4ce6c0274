# SPDX-License-Identifier: Apache-2.0
"""Reading entries of the paged KV cache for attention."""

import torch


class PagedEntries:
    """Entries that one attention call reads, the same in every layer of a KV-cache group.

    Copying rows of one flat view takes a tenth of the time of indexing by block and offset. Rows
    and the memory they are copied to are remembered, since the layers of a group differ by nothing
    but where their cache begins.

    Attributes:
        shape: (num_reqs, num_entries).
    """

    def __init__(self, block_ids: torch.Tensor, block_offsets: torch.Tensor) -> None:
        """
        Args:
            block_ids: [num_reqs, num_entries], int64.
            block_offsets: [num_reqs, num_entries], int64.
        """
        self.shape = tuple(block_ids.shape)
        self._block_ids = block_ids
        self._block_offsets = block_offsets
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._copies: dict[torch.dtype, torch.Tensor] = {}

    def copy_from(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """What the cache of one layer holds there.

        Args:
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides.

        Returns:
            [num_reqs, num_kv_heads, num_entries, 2 * head_size], overwritten by the next call.
        """
        num_kv_heads, width = kv_cache.shape[1], kv_cache.shape[3]
        strides = kv_cache.stride()
        if strides[3] != 1 or any(stride % width for stride in strides[:3]):
            # Pages that are padded to the size of another group's.
            return kv_cache[self._block_ids, :, self._block_offsets].transpose(1, 2)
        layout = (num_kv_heads, width, *strides)
        if layout not in self._rows:
            self._rows[layout] = self._rows_of(num_kv_heads, *(s // width for s in strides[:3]))
        rows = self._rows[layout]
        copy = self._copies.get(kv_cache.dtype)
        if copy is None or copy.shape != (len(rows), width):
            copy = self._copies[kv_cache.dtype] = kv_cache.new_empty(len(rows), width)
        reach = sum((n - 1) * s for n, s in zip(kv_cache.shape[:3], strides[:3], strict=True))
        flat = kv_cache.as_strided((reach // width + 1, width), (width, 1))
        torch.index_select(flat, 0, rows, out=copy)
        return copy.view(len(self._block_ids), num_kv_heads, -1, width)

    def _rows_of(
        self, num_kv_heads: int, by_block: int, by_head: int, by_slot: int
    ) -> torch.Tensor:
        """Rows [num_reqs * num_kv_heads * num_entries] of a cache with these strides."""
        first = self._block_ids * by_block + self._block_offsets * by_slot
        return (first[:, None] + by_head * torch.arange(num_kv_heads)[:, None]).flatten()
