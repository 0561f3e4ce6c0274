# SPDX-License-Identifier: Apache-2.0
"""Attention of the heads that retrieve, for all heads of a layer, as in CompressKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, field_validator, model_validator

from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.model_profile import LayerProfile
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.pooling import odd, pool
from ems_vllm.policies.window_attention import WindowScorer, window_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("compresskv")
class CompressKVScorer(WindowScorer):
    """Attention that the best retrieval heads of a layer pay, smoothed; alike for all its kv_heads.

    Paper: Lin et al. 2025, CompressKV, arXiv:2508.02401. Which query heads retrieve is measured
    once for a model (`ems-vllm calibrate --by semantic`). Of each layer the best ones alone, by the
    sum over the recorded queries, choose what all kv_heads keep. The paper's layer budgets are
    `allocator: profile`, of what `ems-vllm calibrate --by error` measures. Deviation: runs while
    decoding, too, every `recompress_interval` tokens.
    """

    papers = (Paper("CompressKV", "Lin et al.", 2025, "2508.02401"),)

    profile: LayerProfile
    """What `ems-vllm calibrate --by semantic` measured: the name of a profile that ships, the path
    of a YAML file, or its content."""

    num_heads: Annotated[int, Field(ge=1, le=256)] = 4
    """Query heads of a layer that choose."""

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 5
    """Width of the mean over neighbouring entries, odd; 1 switches it off."""

    _odd = field_validator("kernel_size")(odd)

    @model_validator(mode="after")
    def _has_query_heads(self) -> CompressKVScorer:
        if self.profile.query_heads is None:
            raise ValueError(
                "profile says nothing of query heads; measure one with "
                "`ems-vllm calibrate --by semantic`"
            )
        return self

    @property
    def across_heads(self) -> bool:
        return True

    @property
    def reads_profile(self) -> bool:
        return True

    def missing(self, layers: list[int], num_heads: int) -> str | None:
        known = self.profile.query_heads
        assert known is not None
        for layer in layers:
            if layer not in known:
                return f"says nothing of layer {layer}"
            if sorted(known[layer]) != list(range(num_heads)):
                return f"has {len(known[layer])} query heads in layer {layer}, not {num_heads}"
        return None

    def score(self, context: CompactionContext) -> Scores:
        weights = context.new_scores()
        assert context.query_ring is not None
        chosen = self._chosen(context, context.query_ring.shape[3])
        for window in window_attention(context):
            of_layers = chosen[window.part.layers, None, :, :, None]
            for at, attention in window.attention(of_entries=True):
                # Summed over the group; the sum over kv_heads, and ranks, comes at the end.
                received = attention.sum(-2).mul_(of_layers).sum(-2)
                weights[window.part.place][..., at] = received
        weights.masked_fill_(~context.is_entry, 0.0)
        # Of this rank's kv_heads and all others the mean, of which the chosen heads make a part.
        shared = context.mean_of_heads(weights)
        return Scores(pool(shared, context.is_entry, self.kernel_size, "avg"))

    def _chosen(self, context: CompactionContext, num_heads: int) -> Tensor:
        """[num_layers, num_kv_heads, group], float32: 1 for a query head that chooses."""
        known = self.profile.query_heads
        assert known is not None
        chosen = torch.zeros(context.num_layers, num_heads)
        for row, layer in zip(chosen, context.layer_ids, strict=True):
            for head in known[layer][: self.num_heads]:
                if 0 <= head - context.first_head < num_heads:
                    row[head - context.first_head] = 1.0
        return chosen.to(context.device).unflatten(1, (context.num_kv_heads, -1))
