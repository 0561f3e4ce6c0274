# SPDX-License-Identifier: Apache-2.0
"""Reading a paged cache through a row of a block table."""

import torch


def gather_entries(cache: torch.Tensor, table_row: torch.Tensor, num_entries: int) -> torch.Tensor:
    """The first entries of a request as [num_kv_heads, num_entries, ...] in the cache's dtype.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, ...].
        table_row: [num_columns], integer.
        num_entries: entries to read, <= num_columns * block_size.
    """
    num_kv_heads, block_size = cache.shape[1:3]
    num_columns = -(-num_entries // block_size)
    blocks = cache[table_row[:num_columns].long()].transpose(0, 1)
    return blocks.reshape(num_kv_heads, num_columns * block_size, *cache.shape[3:])[:, :num_entries]
