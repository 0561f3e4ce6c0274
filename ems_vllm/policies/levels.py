# SPDX-License-Identifier: Apache-2.0
"""From what each layer should keep to levels of layers that are dealt to alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ems_vllm.layer_shares import LayerShares


def in_levels(
    fractions: Mapping[int, Sequence[float]], ratios: Sequence[float], num_levels: int
) -> LayerShares:
    """Put layers that should keep alike into a level, which keeps what they would on the mean.

    Levels are as equal in size as can be: the bytes of a block are those of the largest.

    Args:
        fractions: By layer and ratio: the fraction of a prompt that the layer should keep.
        ratios: See LayerShares.
        num_levels: At most; no more than there are layers.
    """

    def share(layer: int) -> float:
        of_layer = zip(fractions[layer], ratios, strict=True)
        return sum(fraction / ratio for fraction, ratio in of_layer)

    # A layer that keeps more comes first; ties go to the lower layer.
    order = sorted(fractions, key=lambda layer: (-share(layer), layer))
    count = min(num_levels, len(order))
    edges = [len(order) * level // count for level in range(count + 1)]
    levels = [tuple(sorted(order[a:b])) for a, b in pairwise(edges)]
    return LayerShares(
        levels=tuple(levels),
        ratios=tuple(ratios),
        fractions=tuple(
            tuple(
                sum(fractions[layer][at] for layer in level) / len(level)
                for at in range(len(ratios))
            )
            for level in levels
        ),
    )
