# SPDX-License-Identifier: Apache-2.0
"""Statistical leverage of keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.linalg import vector_norm

from ems_vllm.policies.parts import gather

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.parts import Part
    from ems_vllm.policies.rotation import Rotation

# Of the mean diagonal, added to the diagonal (ours): some directions hold nothing but rounding.
_RIDGE = 1e-2
# Of the size of a part's keys: what is held of those before, turned back, and made white.
_NUM_FLOATS = 5
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
    # Products, factors, and what makes keys white, twice.
    pair_bytes = 4 * 4 * context.num_kv_heads * context.key_cache.shape[-1] ** 2
    for layers, rotation in _turned_alike(context):
        for part in context.parts(
            context.key_cache, layers=layers, num_floats=_NUM_FLOATS, pair_bytes=pair_bytes
        ):
            keys = _around_some_key(context, part, rotation)
            _write_lengths(keys, *_moments(context, keys), found[part.layers, part.rows])
    return found.square_()[..., : context.max_entries]


def _write_lengths(keys: Part, centre: Tensor, whitening: Tensor, into: Tensor) -> None:
    """Lengths of white keys, [layers, rows, num_kv_heads, entries]; see _moments."""
    shift = centre @ whitening
    for entries, some_keys in keys:
        white = (some_keys @ whitening).sub_(shift)
        into[..., entries] = vector_norm(white, dim=-1)


def _turned_alike(context: CompactionContext) -> Iterator[tuple[slice, Rotation | None]]:
    """Consecutive layers whose keys RoPE turned by the same angles."""
    rotations = context.rotations or [None] * context.num_layers

    def kind(layer: int) -> tuple[int, bool] | None:
        rotation = rotations[layer]
        return None if rotation is None else (id(rotation.cos_sin), rotation.is_neox)

    for _, group in groupby(range(context.num_layers), kind):
        first, *others = group
        yield slice(first, first + 1 + len(others)), rotations[first]


def _around_some_key(context: CompactionContext, part: Part, rotation: Rotation | None) -> Part:
    """Keys before RoPE around one of them; 0 where there is no entry.

    Where keys have a large mean, products of them as they are would leave little but rounding when
    it is taken off.
    """
    # The last of each row's first block.
    slot = slice(context.block_size - 1, context.block_size)
    some_key = gather(
        context.key_cache[part.layers, ..., slot, :], context.block_table[part.rows, :1]
    )
    some_key = some_key if rotation is None else rotation.undo(some_key, slot)

    def change(entries: slice, keys: Tensor) -> Tensor:
        keys = keys if rotation is None else rotation.undo(keys, entries)
        return context.clear_gaps(part.rows, entries, keys.sub_(some_key))

    return part.made_into(change)


def _moments(context: CompactionContext, keys: Part) -> tuple[Tensor, Tensor]:
    """The mean key, and what turns the keys around it into ones without correlations.

    Args:
        keys: 0 where there is no entry.

    Returns:
        [layers, rows, num_kv_heads, 1, head_size] and [layers, rows, num_kv_heads, head_size,
        head_size].
    """
    shape, head_size = (*keys.shape, context.num_kv_heads), context.key_cache.shape[-1]
    sums = torch.zeros((*shape, 1, head_size), device=context.device)
    products = sums.new_zeros((*shape, head_size, head_size))
    for _, some_keys in keys:
        sums += some_keys.sum(-2, keepdim=True)
        products += some_keys.mT @ some_keys
    off = sums / context.num_entries[keys.rows, None, None, None].clamp(min=1)
    products.sub_(sums.mT @ off)
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + _TINY)
    # Positive definite by the ridge; without a check there is no synchronisation.
    factors, _ = torch.linalg.cholesky_ex(products)
    identity = torch.eye(factors.shape[-1], device=factors.device).expand_as(factors)
    return off, torch.linalg.solve_triangular(factors, identity, upper=False).mT
