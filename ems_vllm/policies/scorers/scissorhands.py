# SPDX-License-Identifier: Apache-2.0
"""How often an entry matters, as in Scissorhands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.window_attention import WindowScorer, window_attention

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("scissorhands")
class ScissorhandsScorer(WindowScorer):
    """How many recorded queries of a group attend to an entry more than to all on the mean.

    Paper: Liu et al. 2023, Scissorhands, arXiv:2305.17118: what mattered in a history window will
    matter again, so an entry counts the queries that pay it at least 1 / t, t being the tokens that
    a query sees, and entries with the fewest go. Ours: query heads of a kv_head count together;
    where counts are equal, which they often are, the mean attention decides.
    """

    papers = (Paper("Scissorhands", "Liu et al.", 2023, "2305.17118"),)

    def score(self, context: CompactionContext) -> Scores:
        weights = context.new_scores()
        for window in window_attention(context):
            group = window.queries.shape[3]
            counted = window.count[:, None, None] * group
            sees = context.num_live[window.part.rows, None] - window.ages
            least = (1.0 / sees.clamp(min=1))[:, None, None, :, None]
            for at, attention in window.attention(of_entries=True):
                mean = attention.sum((-3, -2)) / counted
                matters = (attention >= least).sum((-3, -2)) / counted
                # Smaller than a step of the counts.
                weights[window.part.place][..., at] = matters + mean / (2 * counted)
        return Scores(weights.masked_fill_(~context.is_entry, 0.0))
