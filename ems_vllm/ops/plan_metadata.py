# SPDX-License-Identifier: Apache-2.0
"""Reference of plan_metadata."""

import torch


def plan_metadata(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    first_columns: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """See ems_vllm.ops.plan_metadata."""
    num_columns = block_table.shape[1]
    out_block_table.zero_()
    for row, first in enumerate(first_columns.tolist()):
        num_live = max(num_columns - first, 0)
        out_block_table[row, :num_live] = block_table[row, num_columns - num_live :]
        out_seq_lens[row] = seq_lens[row] - first * block_size
