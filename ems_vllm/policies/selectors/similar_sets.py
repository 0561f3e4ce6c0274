# SPDX-License-Identifier: Apache-2.0
"""One entry of each set of neighbours that are alike, as in KVMerger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm.policies import adjacent
from ems_vllm.policies.base import SELECTORS, Selector
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.selection import best

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Scores
    from ems_vllm.policies.context import CompactionContext


@SELECTORS.register("similar_sets")
class SimilarSetsSelector(Selector):
    """Divides the text where neighbours are least alike, and keeps the best entry of each set.

    Paper: Wang et al. 2024, KVMerger, arXiv:2407.08454, which divides where the cosine of
    neighbouring keys is at most a threshold, and leaves the budget open. Here the budget is met:
    each kv_head has the threshold that makes as many sets as entries stay (ours). The entries with
    the highest scores are sets of their own, and so are sinks.
    """

    papers = (Paper("KVMerger", "Wang et al.", 2024, "2407.08454"),)

    alone_share: Annotated[float, Field(ge=0, le=0.4)] = 0.1
    """Part of the budget whose entries, those with the highest scores, are merged with nothing."""

    @property
    def goes_by_budget(self) -> bool:
        return True

    @property
    def follows_scores(self) -> bool:
        return False

    @property
    def num_rank_tensors(self) -> int:
        return 10

    @property
    def scratch_bytes(self) -> int:
        return adjacent.SCRATCH_BYTES

    def rank(self, context: CompactionContext, scores: Scores) -> Tensor:
        weights = scores.weights
        alone = best(context, weights, (context.budgets * self.alone_share).int())
        alone |= ~context.is_eligible
        # Higher is a better place to divide, between an entry and the next one.
        unlike = 1 - adjacent.similarity_to_next(context)
        unlike[..., :-1].masked_fill_(alone[..., :-1] | alone[..., 1:], 4.0)
        unlike.clamp_(min=0)
        # Behind the last entry there is nothing to divide.
        last = (context.num_entries - 1).clamp(min=0)
        divided = best(context, unlike, (context.budgets - 1).clamp(min=0), before=last)
        sets = torch.zeros_like(divided, dtype=torch.int32)
        torch.cumsum(divided[..., :-1], -1, dtype=torch.int32, out=sets[..., 1:])
        index = sets.long()
        masked = weights.masked_fill(~context.is_entry, -1.0)
        highest = torch.full_like(weights, -1.0).scatter_reduce_(-1, index, masked, "amax")
        is_pivot = (highest.gather(-1, index) == weights) & context.is_entry
        above = weights.amax(-1, keepdim=True) + 1
        return torch.where(is_pivot, weights + above, weights)
