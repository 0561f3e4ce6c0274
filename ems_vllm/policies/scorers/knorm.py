# SPDX-License-Identifier: Apache-2.0
"""Key-norm score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext

# Keeps the reciprocal finite; far below the norm of any real key.
_EPS = 1e-6


@SCORERS.register("knorm")
class KnormScorer(Scorer):
    """Keys with a small norm tend to receive much attention, so they score high.

    Paper: Devoto et al. 2024, arXiv:2406.11430. The score is the reciprocal of the norm: the same
    order as the paper's negated norm, and positive, as a weight in a merge must be. Needs no
    queries, so a hit in the prefix cache changes nothing.
    """

    papers = (Paper("L2 norm", "Devoto et al.", 2024, "2406.11430"),)

    def score(self, context: CompactionContext) -> Scores:
        weights = context.key_norms().add_(_EPS).reciprocal_()
        return Scores(weights.masked_fill_(~context.is_entry, 0.0))
