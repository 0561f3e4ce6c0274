# SPDX-License-Identifier: Apache-2.0
"""What the keys of a kv_head have in common, and how they vary."""

import torch
from torch.nn.functional import normalize

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries
from ems_vllm.ops.rope import turned_back


@operator
def key_moments(
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_entries: torch.Tensor,
    cos_sin: torch.Tensor | None,
    is_neox: bool,
    directions: torch.Tensor,
    means: torch.Tensor | None = None,
    products: torch.Tensor | None = None,
) -> None:
    """Sum the directions of keys, and the products of centred keys before RoPE.

    Papers: KeyDiff, 2025, arXiv:2504.15364 (directions); Compactor, 2025, arXiv:2507.08143 (keys
    before RoPE, whose products say which of them stand for what no other does).

    With k the keys of a row's kv_head as they are stored, and x those before RoPE:

        directions = sum of k / |k|
        means      = mean of x
        products   = sum of (x - means) (x - means)^T

    A zero vector has no direction. Where a row has no entries, all are 0.

    Args:
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float, or
            float8_e4m3fn.
        block_table: [num_rows, num_columns], int32.
        num_entries: [num_rows], int32.
        cos_sin: [num_positions, rotary_dim], float of any dtype, or None - the angles by which RoPE
            turned the keys of these layers, cosines before sines; entry e was at position e. Keys
            at positions beyond, and all where it is None, are taken as they are stored.
        is_neox: whether dimension i turns with i + rotary_dim / 2; otherwise 2 i with 2 i + 1.
        directions: [num_layers, num_rows, num_kv_heads, head_size], float32.
        means: like directions, or None - together with products.
        products: [num_layers, num_rows, num_kv_heads, head_size, head_size], float32, or None;
            contiguous in its last two dimensions.
    Mutates:
        directions, means, products: all of them.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index or a length is out of range.
    Workspace: on a GPU at most 32 MiB.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    # In float64, whatever the inputs are.
    for layer in range(len(key_cache)):
        for row in range(len(block_table)):
            count = int(num_entries[row])
            keys = gather_entries(key_cache[layer], block_table[row], count).double()
            directions[layer, row] = normalize(keys, dim=-1, eps=1e-300).sum(1).float()
            if means is None or products is None:
                continue
            keys = turned_back(keys, cos_sin, is_neox)
            mean = keys.sum(1, keepdim=True) / max(count, 1)
            means[layer, row] = mean[:, 0].float()
            products[layer, row] = ((keys - mean).mT @ (keys - mean)).float()
