# SPDX-License-Identifier: Apache-2.0
"""Between entries in a row and entries in pages."""

from __future__ import annotations

import torch


def to_pages(entries: torch.Tensor, block_size: int) -> torch.Tensor:
    """Lay entries out in pages, in order; the last page is filled up with zeros.

    Args:
        entries: [num_layers, num_kv_heads, num_entries, ...].
        block_size: Entries per page.

    Returns:
        [num_layers, num_pages, num_kv_heads, block_size, ...], a copy.
    """
    num_layers, num_kv_heads, num_entries, *rest = entries.shape
    num_pages = -(-num_entries // block_size)
    padded = entries.new_zeros((num_layers, num_kv_heads, num_pages * block_size, *rest))
    padded[:, :, :num_entries] = entries
    return padded.unflatten(2, (num_pages, block_size)).transpose(1, 2).contiguous()


def from_pages(pages: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Entries start..stop-1 of pages, [num_layers, num_kv_heads, stop - start, ...]; a copy."""
    return pages.transpose(1, 2).flatten(2, 3)[:, :, start:stop].contiguous()
