# SPDX-License-Identifier: Apache-2.0
"""The highest scores, per kv_head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.policies.base import SELECTORS, Selector

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Scores
    from ems_vllm.policies.context import CompactionContext


@SELECTORS.register("top_k")
class TopKSelector(Selector):
    """Keeps the sinks and the highest scores of each kv_head; the next best may be merged."""

    def rank(self, context: CompactionContext, scores: Scores) -> Tensor:
        return scores.weights
