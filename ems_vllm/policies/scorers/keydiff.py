# SPDX-License-Identifier: Apache-2.0
"""How little a key resembles the others, as in KeyDiff."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.key_scores import SCRATCH_BYTES, key_scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("keydiff")
class KeyDiffScorer(Scorer):
    """1 minus the cosine of a key with the mean direction of all keys: what is distinct stays.

    Paper: Park et al. 2025, KeyDiff, arXiv:2504.15364. The paper's score is the negated cosine: the
    same order. Deviation: eviction runs at the prompt's end (or every `prefill_interval` tokens,
    which is the paper's block-wise form) and every `recompress_interval` generated tokens. Needs no
    queries, so a hit in the prefix cache changes nothing.
    """

    papers = (Paper("KeyDiff", "Park et al.", 2025, "2504.15364"),)

    @property
    def scratch_bytes(self) -> int:
        return SCRATCH_BYTES

    def score(self, context: CompactionContext) -> Scores:
        # Rounding may leave it below 0.
        distinctness = key_scores(context, with_leverage=False).distinctness
        return Scores(distinctness.clamp_(min=0))
