# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest token, as in TOVA."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("tova")
class TOVAScorer(Scorer):
    """Attention that the newest query pays, in the mean of all heads of the layer.

    Paper: Oren et al. 2024, TOVA, arXiv:2401.06104. All kv_heads of a layer keep the same tokens,
    as in the paper. Deviations: eviction runs at the prompt's end and every `recompress_interval`
    generated tokens instead of at every token, and the recent window stays.
    """

    papers = (Paper("TOVA", "Oren et al.", 2024, "2401.06104"),)

    @property
    def uses_window(self) -> bool:
        return True

    @property
    def across_heads(self) -> bool:
        return True

    def score(self, context: CompactionContext) -> Scores:
        newest = replace(context, num_queries=context.num_queries.clamp(max=1))
        return Scores(context.mean_of_heads(newest.window_scores()))
