# SPDX-License-Identifier: Apache-2.0
"""Accumulated attention score of H2O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("h2o")
class H2OScorer(Scorer):
    """Attention that an entry has received from all queries so far (heavy hitters).

    Paper: Zhang et al. 2023, arXiv:2306.14048. Deviations: eviction runs at the prompt's end and
    every `recompress_interval` generated tokens instead of at every token; of the tokens generated
    between two compressions the last `obs_window` are recorded and count for all of them (ours,
    `CompactionContext.accumulated_scores`); the recent half of the paper's budget is
    `recent_window`, beside the budget.
    """

    papers = (Paper("H2O", "Zhang et al.", 2023, "2306.14048"),)

    @property
    def uses_accumulated(self) -> bool:
        return True

    @property
    def uses_window(self) -> bool:
        return True

    def score(self, context: CompactionContext) -> Scores:
        carry = context.accumulated_scores(context.window_scores())
        return Scores(carry, carry)
