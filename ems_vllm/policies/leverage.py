# SPDX-License-Identifier: Apache-2.0
"""Statistical leverage of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.context import SLICE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext, Place

# Of the mean diagonal, added to the diagonal (ours): some directions hold nothing but rounding.
_RIDGE = 1e-2
# Of the size of a slice: 8 while it is turned back, made into a matrix, and solved for. Twice as
# many leave half of SLICE_BYTES for products and factors.
_NUM_FLOATS = 16
# Where all keys are the same, any number that can be divided by.
_TINY = 1e-20


def key_leverage(context: CompactionContext) -> Tensor:
    """How much an entry's key stands for what no other key of its kv_head does.

    Paper: Chari & Van Durme 2025, Compactor, arXiv:2507.08143: the leverage x G^-1 x of a centred
    key x before RoPE, G the sum of x x over all. Here it is exact instead of sketched, and has a
    ridge. RoPE is undone where positions of entries are known (`CompactionContext.rotations`); keys
    of rows that have been compressed before count as they are stored.

    Returns:
        [num_layers, num_rows, num_kv_heads, max_entries], float32, in [0, 1]; anything beyond a
        row's entries.
    """
    keys = _Keys(context)
    found = context.new_entries()
    row_bytes = 2 * 4 * context.num_kv_heads * context.key_cache.shape[-1] ** 2
    num_rows = max(1, SLICE_BYTES // 2 // row_bytes)
    for layer in range(context.num_layers):
        for row in range(0, context.num_rows, num_rows):
            some = slice(row, min(row + num_rows, context.num_rows))
            centres, factors = _moments(context, keys, layer, some)
            for (_, rows, columns), centred in keys.slices(layer, some, centres):
                within = slice(rows.start - row, rows.stop - row)
                whitened = torch.linalg.solve_triangular(factors[within], centred.mT, upper=False)
                of_each = whitened.square_().sum(-2)
                found[layer, rows, :, columns] = of_each.unflatten(-1, (-1, context.block_size))
    return found.flatten(3)[..., : context.max_entries]


def _moments(
    context: CompactionContext, keys: _Keys, layer: int, rows: slice
) -> tuple[Tensor, Tensor]:
    """Means of keys, and the Cholesky factors of what they make around them.

    Returns:
        [rows, num_kv_heads, head_size] and [rows, num_kv_heads, head_size, head_size].
    """
    head_size = context.key_cache.shape[-1]
    shape = (rows.stop - rows.start, context.num_kv_heads, head_size)
    centres = torch.zeros(shape, device=context.device)
    products = torch.zeros((*shape, head_size), device=context.device)
    for (_, some, _), flat in keys.slices(layer, rows, None):
        centres[some.start - rows.start : some.stop - rows.start] += flat.sum(-2)
    centres.div_(context.num_entries[rows, None, None].clamp(min=1))
    for (_, some, _), flat in keys.slices(layer, rows, centres):
        products[some.start - rows.start : some.stop - rows.start] += flat.mT @ flat
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + _TINY)
    # Positive definite by the ridge; without a check there is no synchronisation.
    factors, _ = torch.linalg.cholesky_ex(products)
    return centres, factors


class _Keys:
    """Keys before RoPE, as far as that is known; 0 where no entry is."""

    def __init__(self, context: CompactionContext) -> None:
        self._context = context
        slots = torch.arange(context.num_columns * context.block_size, device=context.device)
        columns = (context.num_columns, context.block_size)
        self._is_entry = (slots < context.num_entries[:, None]).unflatten(1, columns)
        # Angle 0 where the position is not known.
        self._positions = (slots * context.is_untouched[:, None]).unflatten(1, columns)

    def slices(
        self, layer: int, rows: slice, centres: Tensor | None
    ) -> Iterator[tuple[Place, Tensor]]:
        """As many at a time as `SLICE_BYTES` allow.

        Args:
            layer, rows: Of these.
            centres: [rows, num_kv_heads, head_size] - what is taken off.

        Yields:
            Layer, rows and columns, and [rows, num_kv_heads, entries, head_size], float32.
        """
        rotations = self._context.rotations
        rotation = rotations[layer] if rotations else None
        some_layers = slice(layer, layer + 1)
        for at, stored in self._context.slices(
            self._context.key_cache, layers=some_layers, rows=rows, num_floats=_NUM_FLOATS
        ):
            _, some, columns = at
            keys = stored.float()
            if rotation is not None:
                keys = rotation.undo(keys, self._positions[some, columns, None])
            if centres is not None:
                within = slice(some.start - rows.start, some.stop - rows.start)
                keys.sub_(centres[within, None, :, None])
            # No product: a slot that holds no entry may hold anything, NaN included.
            keys.masked_fill_(~self._is_entry[some, columns, None, :, None], 0.0)
            yield at, keys.transpose(1, 2).flatten(2, 3)
