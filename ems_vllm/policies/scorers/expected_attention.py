# SPDX-License-Identifier: Apache-2.0
"""Attention that queries to come are expected to pay, as in Expected Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.key_scores import turned_alike
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.reading import softmax_over
from ems_vllm.policies.window_attention import WindowAttention, WindowScorer, window_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.rotation import Rotation


@SCORERS.register("expected_attention")
class ExpectedAttentionScorer(WindowScorer):
    """Expected attention of the next queries, times |v|, if they are normally distributed.

    Paper: Devoto et al. 2025, Expected Attention, arXiv:2510.00636. With the mean q and the
    covariance C of queries before RoPE, turned by the mean rotation of the next positions,

        score = (mean over the group of softmax(scale q k + scale^2 k C k / 2) + epsilon) * |v|

    Deviation: mean and covariance are those of the recorded queries (`obs_window`, at most 256)
    instead of all queries of the prompt. Layers whose RoPE is not known are taken to have none.
    """

    papers = (Paper("Expected Attention", "Devoto et al.", 2025, "2510.00636"),)

    num_future: Annotated[int, Field(ge=1, le=65536)] = 512
    """Positions to come, over which rotations are averaged."""

    use_covariance: bool = True
    """Whether the covariance of the queries counts, beside their mean."""

    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Added to each expected attention; public code takes 0.01 with head budgets by scores."""

    def score(self, context: CompactionContext) -> Scores:
        weights = context.value_norms()
        assert context.query_ring is not None
        _, _, _, num_heads, head_size = context.query_ring.shape
        # Products of keys with a covariance for each head of the group, and covariances turned.
        of_entry, of_row = 3 * num_heads * head_size, 4 * num_heads * head_size**2
        for layers, rotation in turned_alike(context):
            for window in window_attention(
                context, floats_per_entry=of_entry, floats_per_row=of_row, layers=layers
            ):
                mean, covariance = self._statistics(window, rotation)
                self._write(window, mean, covariance, weights)
        return Scores(weights)

    def _statistics(
        self, window: WindowAttention, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor | None]:
        """[layers, rows, num_kv_heads, group, head_size], and the same times head_size."""
        queries, count = window.queries, window.count[:, None, None, None, None]
        if rotation is not None:
            turned_by = rotation.at(window.positions)[:, None, None]
            queries = rotation.turn(queries, turned_by, back=True)
        mean = queries.sum(-2, keepdim=True) / count
        covariance = None
        if self.use_covariance:
            is_recorded = window.is_recorded[:, None, None, :, None]
            centred = (queries - mean).masked_fill_(~is_recorded, 0.0)
            covariance = centred.transpose(-1, -2) @ centred / count
        mean = mean.squeeze(-2)
        if rotation is not None:
            context = window.part.context
            steps = torch.arange(self.num_future, device=context.device)
            future = context.end_positions[window.part.rows, None] + steps
            turned_by = rotation.at(future).mean(1)[:, None, None]
            mean = rotation.turn(mean, turned_by)
            if covariance is not None:
                turned_by = turned_by[..., None, :]
                covariance = rotation.turn(covariance, turned_by).transpose(-1, -2)
                covariance = rotation.turn(covariance, turned_by)
        return mean, covariance

    def _write(
        self, window: WindowAttention, mean: Tensor, covariance: Tensor | None, weights: Tensor
    ) -> None:
        """Multiply the norms of values in `weights` by expected attention."""
        part, context = window.part, window.part.context
        scale = context.scale
        is_sink = (
            torch.arange(context.max_entries, device=context.device)
            < (context.num_protected[part.rows, None])
        )
        is_hidden = (~context.is_entry[0, part.rows, 0] | is_sink)[None, :, None, None]

        def logits(at: slice) -> Tensor:
            keys = part.keys(at)[:, :, :, None]
            found = (keys @ mean[..., None]).squeeze(-1) * scale
            if covariance is not None:
                found.add_((keys @ covariance).mul_(keys).sum(-1), alpha=scale**2 / 2)
            return found.masked_fill_(is_hidden[..., at], -torch.inf)

        for at, expected in softmax_over(part.entries(), logits):
            weights[part.place][..., at].mul_(expected.mean(-2).nan_to_num_().add_(self.epsilon))
