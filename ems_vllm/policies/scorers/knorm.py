# SPDX-License-Identifier: Apache-2.0
"""Key-norm score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.base import SCORERS, Scorer, Scores

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

    def score(self, context: CompactionContext) -> Scores:
        norms = torch.linalg.vector_norm(context.gather_keys(), dim=-1, dtype=torch.float32)
        return Scores(torch.where(context.is_entry, 1.0 / (norms + _EPS), 0.0))
