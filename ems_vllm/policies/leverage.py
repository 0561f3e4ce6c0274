# SPDX-License-Identifier: Apache-2.0
"""Statistical leverage of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.context import SLICE_BYTES, computable

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# Of the mean diagonal, added to the diagonal (ours): some directions hold nothing but rounding.
_RIDGE = 1e-2
# Of the size of a slice: 8 while it is turned back, centred, and made white. Twice as many leave
# half of SLICE_BYTES for products and factors.
_NUM_FLOATS = 16
# Where all keys are the same, any number that can be divided by.
_TINY = 1e-20


def key_leverage(context: CompactionContext) -> Tensor:
    """How much an entry's key stands for what no other key of its kv_head does.

    Paper: Chari & Van Durme 2025, Compactor, arXiv:2507.08143: the leverage x G^-1 x of a centred
    key x before RoPE, G the sum of x x over all. Here it is exact instead of sketched, and has a
    ridge.

    Returns:
        [num_layers, num_rows, num_kv_heads, max_entries], float32, in [0, 1]; anything beyond a
        row's entries, and in rows that are not `is_untouched`: the positions of their entries, at
        which RoPE would have to be undone, are not known.
    """
    found = context.new_entries()
    row_bytes = 3 * 4 * context.num_kv_heads * context.key_cache.shape[-1] ** 2
    num_rows = max(1, SLICE_BYTES // 2 // row_bytes)
    for layer in range(context.num_layers):
        for row in range(0, context.num_rows, num_rows):
            part = _Part(context, layer, slice(row, min(row + num_rows, context.num_rows)))
            centre, whitening = part.moments()
            for rows, columns, keys in part.slices(centre):
                white = keys @ whitening[part.within(rows)]
                of_each = white.square_().sum(-1).unflatten(-1, (-1, context.block_size))
                found[layer, rows, :, columns] = of_each
    return found.flatten(3)[..., : context.max_entries]


class _Part:
    """Keys of some rows in one layer, before RoPE."""

    def __init__(self, context: CompactionContext, layer: int, rows: slice) -> None:
        self._context = context
        self._layer = layer
        self._rows = rows
        self._rotation = context.rotations[layer] if context.rotations else None
        slots = torch.arange(context.num_columns * context.block_size, device=context.device)
        self._is_entry = slots < context.num_entries[:, None]

    def within(self, rows: slice) -> slice:
        """Rows of the context, in what has one for each row of the part."""
        return slice(rows.start - self._rows.start, rows.stop - self._rows.start)

    def slices(self, centre: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Keys around a centre, as many at a time as half of `SLICE_BYTES` allows.

        Args:
            centre: [rows, num_kv_heads, 1, head_size].

        Yields:
            Rows, columns and [rows, num_kv_heads, entries, head_size], float32; 0 where there is
            no entry.
        """
        context, block_size = self._context, self._context.block_size
        layers = slice(self._layer, self._layer + 1)
        for (_, rows, columns), stored in context.slices(
            context.key_cache, layers=layers, rows=self._rows, num_floats=_NUM_FLOATS
        ):
            entries = slice(columns.start * block_size, columns.stop * block_size)
            keys = stored.transpose(1, 2).flatten(2, 3).float()
            if self._rotation is not None:
                keys = self._rotation.undo(keys, entries)
            keys = keys - centre[self.within(rows)]
            # No product: a slot that holds no entry may hold anything, NaN included.
            yield rows, columns, torch.where(self._is_entry[rows, None, entries, None], keys, 0.0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean key, and what turns the keys around it into ones without correlations.

        Returns:
            [rows, num_kv_heads, 1, head_size] and [rows, num_kv_heads, head_size, head_size].
        """
        context = self._context
        head_size = context.key_cache.shape[-1]
        shape = (self._rows.stop - self._rows.start, context.num_kv_heads)
        sums = torch.zeros((*shape, 1, head_size), device=context.device)
        products = torch.zeros((*shape, head_size, head_size), device=context.device)
        # Around some key: where keys have a large mean, products of them as they are would leave
        # little but rounding when it is taken off.
        some_key = self._some_key()
        for rows, _, keys in self.slices(some_key):
            within = self.within(rows)
            sums[within] += keys.sum(-2, keepdim=True)
            products[within] += keys.mT @ keys
        off = sums / context.num_entries[self._rows, None, None, None].clamp(min=1)
        products.sub_(sums.mT @ off)
        diagonal = products.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + _TINY)
        # Positive definite by the ridge; without a check there is no synchronisation.
        factors, _ = torch.linalg.cholesky_ex(products)
        identity = torch.eye(head_size, device=context.device).expand_as(factors)
        whitening = torch.linalg.solve_triangular(factors, identity, upper=False)
        return some_key + off, whitening.mT

    def _some_key(self) -> Tensor:
        """[rows, num_kv_heads, 1, head_size]: the last of each row's first block, before RoPE."""
        context = self._context
        blocks = context.block_table[self._rows, 0].long()
        slot = slice(context.block_size - 1, context.block_size)
        keys = computable(context.key_cache[self._layer, blocks, :, slot]).float()
        rotation = self._rotation
        return keys if rotation is None else rotation.undo(keys, slot)
