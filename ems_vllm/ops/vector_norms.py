# SPDX-License-Identifier: Apache-2.0
"""Lengths of entries' keys or values."""

import torch

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries


@operator
def vector_norms(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    num_entries: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    """Euclidean norms of the keys or values of entries, as they are stored.

    Args:
        cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float, or
            float8_e4m3fn.
        block_table: [num_rows, num_columns], int32.
        num_entries: [num_rows], int32 - <= max_entries.
        norms: [num_layers, num_rows, num_kv_heads, max_entries], float32.
    Mutates:
        norms: all of them; 0 beyond num_entries.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index or a length is out of range.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    # In float64, whatever the inputs are.
    norms.zero_()
    for layer in range(len(cache)):
        for row in range(len(block_table)):
            count = int(num_entries[row])
            vectors = gather_entries(cache[layer], block_table[row], count).double()
            norms[layer, row, :, :count] = vectors.norm(dim=-1).float()
