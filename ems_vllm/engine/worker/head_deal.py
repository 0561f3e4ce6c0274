# SPDX-License-Identifier: Apache-2.0
"""How the kv_heads of a rank share what their layers keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.model_executor.models.utils import extract_layer_index

if TYPE_CHECKING:
    from ems_vllm.head_shares import HeadShares


class HeadsDiffer(ValueError):
    """An allocator deals to other kv_heads than there are."""


def shares_of_rank(
    shares: Mapping[int, HeadShares],
    names: Sequence[str],
    *,
    num_heads: int,
    total_heads: int,
    rank: int,
    num_ranks: int,
) -> list[HeadShares]:
    """Shares among the kv_heads that this rank has, of each layer.

    A block holds equally many entries on every rank, so each rank deals what it has of a layer to
    its own heads only (ours).

    Args:
        shares: By index of a layer of the model, among all its kv_heads.
        names: Of the layers.
        num_heads: kv_heads of a layer on this rank.
        total_heads: Of a layer of the model.
        rank, num_ranks: Of tensor parallelism.

    Raises:
        HeadsDiffer: a layer has no shares, or the model has another number of heads.
    """
    # Where there are fewer heads than ranks, some ranks have the same one.
    start = rank * total_heads // num_ranks
    found = []
    for name in names:
        of_layer = shares.get(extract_layer_index(name))
        if of_layer is None:
            raise HeadsDiffer(f"nothing to the kv_heads of {name}")
        if of_layer.num_heads != total_heads:
            raise HeadsDiffer(
                f"shares to {of_layer.num_heads} kv_heads of {name}, which has {total_heads}"
            )
        found.append(of_layer.of_heads(start, start + num_heads))
    return found
