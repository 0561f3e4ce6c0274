# SPDX-License-Identifier: Apache-2.0
"""Global-local score of EMS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator
from torch import maximum, where

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.pooling import Pooling, odd, pool

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("ems")
class EMSScorer(Scorer):
    """Mean-aligned maximum of the accumulated and the recent attention, per kv_head.

    Paper: Li et al. 2024, arXiv:2412.08521. The structure (a global and a local accumulated
    attention score, aligned by their means, combined by a maximum, for every head) is the paper's;
    its exact form was not available to us, so this is our reading:

        score = max(global * mean(local) / mean(global), local)

    The maximum keeps what the whole prompt looked at as well as what the end of it looks at.
    Query heads of a kv_head are averaged (ours). At a recompression while decoding, the carried
    global score of an entry grows by the attention of the recorded queries, which count for all
    tokens generated since the last compression (ours, `CompactionContext.accumulated_scores`).
    Pooling is SnapKV's idea; that it looks back only is ours: a model that copies attends to where
    the copy begins, and reads on from there when the prompt has long been compressed.
    """

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 13
    """Width of the pooling over neighbouring entries, odd; 1 switches it off."""

    pooling: Pooling = "forward"
    """How: avg, max, or forward, the maximum over an entry and those before it (ours)."""

    _odd = field_validator("kernel_size")(odd)

    sample_stride: Annotated[int, Field(ge=1, le=16)] = 1
    """Of the prompt's queries, one block of 64 in so many is accumulated (ours); 1 takes all."""

    @property
    def uses_global(self) -> bool:
        return True

    @property
    def global_stride(self) -> int:
        return self.sample_stride

    @property
    def uses_window(self) -> bool:
        return True

    def score(self, context: CompactionContext) -> Scores:
        window = context.window_scores()
        carry = context.accumulated_scores(window)
        weights = maximum(carry * _mean_ratio(window, carry), window, out=window)
        return Scores(pool(weights, context.is_entry, self.kernel_size, self.pooling), carry)


def _mean_ratio(window: Tensor, carry: Tensor) -> Tensor:
    """mean(window) / mean(carry) over the entries of a head; 0 where nothing was accumulated."""
    # Both are 0 beyond a row's entries, so the ratio of sums is the ratio of means.
    total = carry.sum(-1, keepdim=True)
    return where(total > 0, window.sum(-1, keepdim=True) / total, 0.0)
