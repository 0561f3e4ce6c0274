# SPDX-License-Identifier: Apache-2.0
"""Attention and how much it shifts, as in CAKE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.pooling import odd, pool
from ems_vllm.policies.window_attention import WindowScorer, window_attention

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("cake")
class CAKEScorer(WindowScorer):
    """Mean plus `gamma` times variance of the attention of recorded queries, smoothed.

    Paper: Qin et al. 2025, CAKE, arXiv:2503.12491, its indicator of tokens: per query head

        mean over queries + gamma * variance over queries

    averaged over neighbours and over the group. Not served: its layer budgets, which follow from
    each prompt's attention once all layers are through; here layers share a block table for each
    level, whose size is planned before. `coverage` and `allocator: profile` stand in for them.
    Deviation: decoding uses the same score, at every `recompress_interval` tokens.
    """

    papers = (Paper("CAKE", "Qin et al.", 2025, "2503.12491"),)

    gamma: Annotated[float, Field(ge=0, le=1e6)] = 200.0
    """Weight of the variance."""

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 5
    """Width of the mean over neighbouring entries, odd; 1 switches it off."""

    _odd = field_validator("kernel_size")(odd)

    def score(self, context: CompactionContext) -> Scores:
        weights = context.new_scores()
        for window in window_attention(context):
            count = window.count[:, None, None, None, None]
            unrecorded = ~window.is_recorded[:, None, None, :, None]
            for at, attention in window.attention(of_entries=True):
                mean = attention.sum(-2, keepdim=True) / count
                shifts = (attention - mean).square_().masked_fill_(unrecorded, 0.0)
                # Unbiased, as in public code.
                variance = shifts.sum(-2).div_((count - 1).clamp(min=1).squeeze(-1))
                score = mean.squeeze(-2).add_(variance, alpha=self.gamma).mean(-2)
                weights[window.part.place][..., at] = score
        weights.masked_fill_(~context.is_entry, 0.0)
        return Scores(pool(weights, context.is_entry, self.kernel_size, "avg"))
