# SPDX-License-Identifier: Apache-2.0
"""Block tables without the columns that were given back."""

import torch

from ems_vllm.ops.library import operator


@operator
def shift_block_tables(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    first_columns: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """Shift block tables and sequence lengths past the columns that were given back.

    Args:
        block_table: [num_rows, num_columns], int32.
        seq_lens: [num_rows], int32.
        first_columns: [num_rows], int32 - columns that were given back, >= 0.
        block_size: tokens per block.
        out_block_table: [num_rows, num_columns], int32 - not the same memory as block_table.
        out_seq_lens: [num_rows], int32.
    Mutates:
        out_block_table: column c is column c + first_columns[r] of block_table, 0 beyond its end.
        out_seq_lens: seq_lens[r] - first_columns[r] * block_size.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above.
    Note: no host sync and no allocation, so CUDA graphs can capture it; deterministic.
    """
    num_columns = block_table.shape[1]
    out_block_table.zero_()
    for row, first in enumerate(first_columns.tolist()):
        num_live = max(num_columns - first, 0)
        out_block_table[row, :num_live] = block_table[row, num_columns - num_live :]
        out_seq_lens[row] = seq_lens[row] - first * block_size
