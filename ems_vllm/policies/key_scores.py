# SPDX-License-Identifier: Apache-2.0
"""How much the keys of entries stand out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ems_vllm import ops
from ems_vllm.policies.context import SLICE_BYTES, slices

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.rotation import Rotation

# Of the mean diagonal, added to the diagonal (ours): some directions hold nothing but rounding.
_RIDGE = 1e-2
# Where all keys are the same, any number that can be divided by.
_TINY = 1e-20
# Matrices that are there at a time: products, which become what makes keys white, their factors,
# and a copy that torch may make of either.
_NUM_MATRICES = 3

SCRATCH_BYTES = SLICE_BYTES
"""What `key_scores` holds beside what it returns."""


@dataclass(frozen=True)
class KeyScores:
    """What keys say of entries.

    Attributes:
        distinctness: [num_layers, num_rows, num_kv_heads, max_entries], float32, in [0, 2] - how
            little a key resembles the others; 0 beyond a row's entries.
        leverage: Like distinctness, in [0, 1], or None - how much a key stands for what no other
            does. Anything in rows that are not `is_untouched`: the positions of their entries, at
            which RoPE would have to be undone, are not known.
    """

    distinctness: Tensor
    leverage: Tensor | None


def key_scores(context: CompactionContext, *, with_leverage: bool = True) -> KeyScores:
    """Distinctness and leverage of all keys, each of which is read twice for both.

    Papers: Park et al. 2025, KeyDiff, arXiv:2504.15364: the cosine of a key with the mean of all
    keys' directions says how redundant it is. Here it is 1 minus that, so that it is positive.
    Chari & Van Durme 2025, Compactor, arXiv:2507.08143: the leverage x G^-1 x of a centred key x
    before RoPE, G the sum of x x over all. Here it is exact instead of sketched, and has a ridge.
    """
    scores = KeyScores(context.new_scores(), context.new_scores() if with_leverage else None)
    head_size = context.key_cache.shape[-1]
    num_floats = 2 + (_NUM_MATRICES * head_size if with_leverage else 0)
    at_once = max(1, SLICE_BYTES // (4 * context.num_kv_heads * head_size * num_floats))
    for alike, rotation in turned_alike(context):
        for layers, rows in slices(alike, context.num_rows, at_once):
            _write(context, layers, rows, rotation, scores)
    return scores


def _write(
    context: CompactionContext,
    layers: slice,
    rows: slice,
    rotation: Rotation | None,
    scores: KeyScores,
) -> None:
    """The scores of some layers and rows."""
    distinctness = scores.distinctness[layers, rows]
    keys = (
        context.key_cache[layers],
        context.block_table[rows],
        context.num_entries[rows],
        None if rotation is None else rotation.cos_sin,
        rotation is not None and rotation.is_neox,
    )
    directions = distinctness.new_empty((*distinctness.shape[:-1], context.key_cache.shape[-1]))
    if scores.leverage is None:
        ops.key_moments(*keys, directions)
        ops.key_scores(*keys, directions, distinctness)
        return
    means = torch.empty_like(directions)
    products = means.new_empty((*means.shape, means.shape[-1]))
    ops.key_moments(*keys, directions, means, products)
    whitening = _whitening(products)
    leverage = scores.leverage[layers, rows]
    ops.key_scores(*keys, directions, distinctness, means, whitening, leverage)


def _whitening(products: Tensor) -> Tensor:
    """What turns centred keys into ones without correlations.

    Args:
        products: [..., head_size, head_size] of the keys, see ops.key_moments; overwritten.

    Returns:
        Like products; lower triangular.
    """
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + _TINY)
    # Positive definite by the ridge; without a check there is no synchronisation.
    factors, _ = torch.linalg.cholesky_ex(products)
    inverse = products.zero_()
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return torch.linalg.solve_triangular(factors, inverse, upper=False, out=inverse)


def turned_alike(context: CompactionContext) -> Iterator[tuple[range, Rotation | None]]:
    """Consecutive layers whose keys RoPE turned by the same angles."""
    rotations = context.rotations or [None] * context.num_layers

    def kind(layer: int) -> tuple[int, bool] | None:
        rotation = rotations[layer]
        return None if rotation is None else (id(rotation.cos_sin), rotation.is_neox)

    for _, group in groupby(range(context.num_layers), kind):
        first, *others = group
        yield range(first, first + 1 + len(others)), rotations[first]
