# SPDX-License-Identifier: Apache-2.0
"""Observation-window score of SnapKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.pooling import Pooling, odd, pool

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("snapkv")
class SnapKVScorer(Scorer):
    """Attention of the last `obs_window` queries, smoothed over neighbouring entries.

    Paper: Li et al. 2024, arXiv:2404.14469. Query heads of a kv_head are averaged, as public
    implementations for grouped-query attention do. Smoothing after a recompression runs over
    entries, which need no longer be neighbours in the text.
    """

    papers = (Paper("SnapKV", "Li et al.", 2024, "2404.14469"),)

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 5
    """Width of the pooling over neighbouring entries, odd; 1 switches it off."""

    pooling: Pooling = "avg"
    """avg (the paper's), max, or forward, the maximum over an entry and those before it (ours)."""

    _odd = field_validator("kernel_size")(odd)

    @property
    def uses_window(self) -> bool:
        return True

    def score(self, context: CompactionContext) -> Scores:
        weights = context.window_scores()
        return Scores(pool(weights, context.is_entry, self.kernel_size, self.pooling))
