# SPDX-License-Identifier: Apache-2.0
"""What outputs lose without an entry, as in DropKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, field_validator

from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.pooling import odd, pool
from ems_vllm.policies.window_attention import WindowAttention, WindowScorer, window_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# No entry has all the attention: outputs without it would not be defined (ours).
_MOST = 1 - 1e-3


@SCORERS.register("dropkv")
class DropKVScorer(WindowScorer):
    """Squared change of attention outputs if this entry alone were dropped, over recorded queries.

    Source: DropKV, pull request 285 of NVIDIA/kvpress, 2026. Without entry j, a query with
    attention p and output o = sum p v has the output o - p_j / (1 - p_j) (v_j - o), so

        score = sum over queries of (p_j / (1 - p_j))^2 |v_j - o|^2

    averaged over the group and over neighbours. It has one unit in all kv_heads, which `ada` can
    compare. Ours: p_j is at most 0.999.
    """

    papers = (Paper("DropKV", "kvpress", 2026, venue="NVIDIA/kvpress#285"),)

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 7
    """Width of the mean over neighbouring entries, odd; 1 switches it off."""

    _odd = field_validator("kernel_size")(odd)

    def score(self, context: CompactionContext) -> Scores:
        weights = context.new_scores()
        num_floats = 3 * context.num_kv_heads * context.key_cache.shape[-1]
        for window in window_attention(context, floats_per_entry=num_floats):
            outputs = _outputs(window)
            of_outputs = outputs.square().sum(-1, keepdim=True)
            for at, attention in window.attention(of_entries=True):
                values = window.part.values(at)[:, :, :, None]
                attention.clamp_(max=_MOST)
                change = attention.div_(1 - attention).square_()
                # |v - o|^2 without a tensor of its own for each query.
                distance = (outputs @ values.transpose(-1, -2)).mul_(-2).add_(of_outputs)
                distance.add_(values.square().sum(-1)[..., None, :]).clamp_(min=0)
                weights[window.part.place][..., at] = change.mul_(distance).sum(-2).mean(-2)
        weights.masked_fill_(~context.is_entry, 0.0)
        return Scores(pool(weights, context.is_entry, self.kernel_size, "avg"))


def _outputs(window: WindowAttention) -> Tensor:
    """[layers, rows, num_kv_heads, group, obs_window, head_size]: of the recorded queries."""
    outputs = torch.zeros_like(window.queries)
    for at, attention in window.attention():
        outputs += attention @ window.part.values(at)[:, :, :, None]
    return outputs
