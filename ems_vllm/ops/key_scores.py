# SPDX-License-Identifier: Apache-2.0
"""Scores of entries by their keys."""

import torch
from torch.nn.functional import normalize

from ems_vllm.ops.library import operator
from ems_vllm.ops.paging import gather_entries
from ems_vllm.ops.rope import turned_back


@operator
def key_scores(
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_entries: torch.Tensor,
    cos_sin: torch.Tensor | None,
    is_neox: bool,
    directions: torch.Tensor,
    distinctness: torch.Tensor,
    means: torch.Tensor | None = None,
    whitening: torch.Tensor | None = None,
    leverage: torch.Tensor | None = None,
) -> None:
    """Score entries by how little their keys resemble the other keys of their kv_head.

    Papers: KeyDiff, 2025, arXiv:2504.15364 (distinctness); Compactor, 2025, arXiv:2507.08143
    (leverage). Deviations: distinctness is 1 minus the paper's cosine, so that it is positive;
    leverage is exact instead of sketched.

    With k an entry's key as it is stored, and x the key before RoPE:

        distinctness = max(1 - cos(k, directions), 0)
        leverage     = |whitening (x - means)|^2

    The cosine with a zero vector is 0.

    Args:
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float, or
            float8_e4m3fn.
        block_table: [num_rows, num_columns], int32.
        num_entries: [num_rows], int32 - <= max_entries.
        cos_sin, is_neox: as for key_moments.
        directions: [num_layers, num_rows, num_kv_heads, head_size], float32 - from key_moments.
        distinctness: [num_layers, num_rows, num_kv_heads, max_entries], float32.
        means: like directions, or None - from key_moments; together with what follows.
        whitening: [num_layers, num_rows, num_kv_heads, head_size, head_size], float32, or None;
            contiguous in its last two dimensions. The inverse of the lower Cholesky factor of the
            products of keys: lower triangular, and what lies above its diagonal is not used.
        leverage: like distinctness, or None.
    Mutates:
        distinctness, leverage: all of them; 0 beyond num_entries.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index or a length is out of range.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    # In float64, whatever the inputs are.
    distinctness.zero_()
    if leverage is not None:
        leverage.zero_()
    for layer in range(len(key_cache)):
        for row in range(len(block_table)):
            count = int(num_entries[row])
            keys = gather_entries(key_cache[layer], block_table[row], count).double()
            direction = normalize(directions[layer, row].double(), dim=-1, eps=1e-300)
            cosines = normalize(keys, dim=-1, eps=1e-300) @ direction[..., None]
            distinctness[layer, row, :, :count] = (1 - cosines.squeeze(-1)).clamp(min=0).float()
            if means is None or whitening is None or leverage is None:
                continue
            centred = turned_back(keys, cos_sin, is_neox) - means[layer, row, :, None].double()
            white = centred @ whitening[layer, row].double().tril().mT
            leverage[layer, row, :, :count] = white.square().sum(-1).float()
