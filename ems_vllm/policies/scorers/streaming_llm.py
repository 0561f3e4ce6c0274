# SPDX-License-Identifier: Apache-2.0
"""Recency score of StreamingLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("streaming_llm")
class StreamingLLMScorer(Scorer):
    """The later an entry, the higher its score; sinks are protected by the selector.

    Paper: Xiao et al. 2023, arXiv:2309.17453. Deviation: positions are not reassigned inside the
    cache, because vLLM stores keys after RoPE and generation goes on at the true positions.
    """

    papers = (Paper("StreamingLLM", "Xiao et al.", 2023, "2309.17453"),)

    def score(self, context: CompactionContext) -> Scores:
        device = context.key_cache.device
        rank = torch.arange(1, context.max_entries + 1, dtype=torch.float32, device=device)
        weights = context.new_scores().copy_(rank)
        return Scores(weights.masked_fill_(~context.is_entry, 0.0))
