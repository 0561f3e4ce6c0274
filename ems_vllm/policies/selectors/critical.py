# SPDX-License-Identifier: Apache-2.0
"""Scores first, then scores weighted by what values do to the layer's output, as in CriticalKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm.policies import output_norms
from ems_vllm.policies.base import SELECTORS, Selector
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.selection import best

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Scores
    from ems_vllm.policies.context import CompactionContext


@SELECTORS.register("critical")
class CriticalSelector(Selector):
    """Fills a part of the budget by scores, the rest by (score + epsilon) * |W_o v|.

    Paper: Feng et al. 2025, CriticalKV, arXiv:2502.03805, which wraps any score. W_o is the part of
    the layer's output projection that belongs to a query head, |.| the sum of absolute values, in
    the mean over the group. Costs as much as projecting the outputs of a whole prompt.
    """

    papers = (Paper("CriticalKV", "Feng et al.", 2025, "2502.03805"),)

    first_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Part of the budget that scores alone fill."""

    epsilon: Annotated[float, Field(ge=0)] = 1e-4
    """Added to scores before they are weighted, in their unit."""

    @property
    def goes_by_budget(self) -> bool:
        return True

    @property
    def follows_scores(self) -> bool:
        return False

    @property
    def reads_output_weights(self) -> bool:
        return True

    @property
    def num_rank_tensors(self) -> int:
        # What is returned, norms, and the first ones as int32, int64 and a mask.
        return 6

    @property
    def scratch_bytes(self) -> int:
        return output_norms.SCRATCH_BYTES

    def rank(self, context: CompactionContext, scores: Scores) -> Tensor:
        ranked = output_norms.output_norms(context).mul_(scores.weights + self.epsilon)
        is_first = best(context, scores.weights, (context.budgets * self.first_share).int())
        above = ranked.amax(-1, keepdim=True).mul_(2).add_(1)
        ranked.masked_fill_(~context.is_entry, 0.0)
        return torch.where(is_first, above, ranked)
