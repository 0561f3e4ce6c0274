# SPDX-License-Identifier: Apache-2.0
"""How much values change the output of their layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.reading import parts

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

SCRATCH_BYTES = SLICE_BYTES
"""What `output_norms` holds beside what it returns."""


def output_norms(context: CompactionContext) -> Tensor:
    """Sum of absolute values of W_o v, in the mean over the group of query heads.

    W_o is the part of the output projection that belongs to the query head. On a rank of tensor
    parallelism the projection of one of its heads is whole, so nothing is exchanged.

    Returns:
        [num_layers, num_rows, num_kv_heads, max_entries], float32, in the unit of stored values; 0
        beyond a row's entries.
    """
    norms = context.new_scores()
    head_size = context.key_cache.shape[-1]
    num_heads = context.num_kv_heads * context.rows_together
    for layer in range(context.num_layers):
        weight = context.output_weights[layer]
        hidden_size, width = weight.shape
        group = width // (num_heads * head_size)
        # [rows_together, num_kv_heads, group, head_size, hidden_size]
        by_head = weight.t().unflatten(0, (-1, context.num_kv_heads, group, head_size))
        per_entry = context.num_kv_heads * (3 * head_size + 3 * hidden_size)
        per_row = context.num_kv_heads * head_size * hidden_size
        for part in parts(
            context, per_entry, floats_per_row=per_row, layers=range(layer, layer + 1)
        ):
            rows = range(context.num_rows)[part.rows]
            of_rows = [row % context.rows_together for row in rows]
            for at in part.entries():
                values = part.values(at)
                total = norms[part.place][..., at].zero_()
                for head in range(group):
                    # [1, rows, num_kv_heads, head_size, hidden_size]
                    projection = by_head[of_rows, :, head].float()[None]
                    total += (values @ projection).abs_().sum(-1)
                total.div_(group)
    return norms.masked_fill_(~context.is_entry, 0.0)
