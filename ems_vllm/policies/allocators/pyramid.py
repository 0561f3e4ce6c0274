# SPDX-License-Identifier: Apache-2.0
"""The deeper a layer, the fewer entries it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ems_vllm.policies.base import ALLOCATORS, Allocator
from ems_vllm.policies.levels import in_levels
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.layer_shares import LayerShares


@ALLOCATORS.register("pyramid")
class PyramidAllocator(Allocator):
    """Budgets that fall linearly from the first layer to the last.

    Paper: Cai et al. 2024, PyramidKV, arXiv:2406.02069: the last layer keeps 1 / beta of the mean,
    the first as much more than the mean as that is less. Ours: layers in levels, and what happens
    where the first layer would keep more than there is - from there on all move towards everything.
    """

    papers = (Paper("PyramidKV", "Cai et al.", 2024, "2406.02069"),)

    beta: Annotated[float, Field(gt=1, le=1000)] = 20.0
    """How steep it is: the last layer keeps 1 / beta of the mean."""

    num_levels: Annotated[int, Field(ge=1, le=64)] = 3
    """Block tables of a request: layers are dealt to in so many levels, or one by one where there
    are fewer."""

    @property
    def deals_to_layers(self) -> bool:
        return True

    def shares(self, num_layers: int) -> LayerShares:
        last = 1 / self.beta
        step = (2 - 2 * last) / max(1, num_layers - 1)
        # Of the mean; a single layer is the mean.
        of_mean = [2 - last - step * layer for layer in range(num_layers)]
        if num_layers == 1:
            of_mean = [1.0]
        # With this mean the first layer keeps everything.
        ratio = min(0.99, 1 / of_mean[0])
        fractions = {layer: (min(1.0, share * ratio),) for layer, share in enumerate(of_mean)}
        return in_levels(fractions, (ratio,), self.num_levels)
