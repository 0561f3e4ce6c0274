# SPDX-License-Identifier: Apache-2.0
"""Attention at the distances to come, by what queries have in common, as in TriAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm.policies.alignment import deviation
from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.key_scores import turned_alike
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.window_attention import WindowAttention, WindowScorer, window_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.rotation import Rotation


@SCORERS.register("triattention")
class TriAttentionScorer(WindowScorer):
    """Logits of the mean query at distances 1, 2, 4, ..., and what single queries may add.

    Paper: Mao et al. 2026, TriAttention, arXiv:2604.04921. RoPE turns pairs of dimensions; with
    pairs as complex numbers, q_f of a query before RoPE and k_f of a key as it is stored,

        logit = mean over o of Re sum_f mean(q_f) exp(i w_f (P + o)) conj(k_f)
                + sum_f (mean(|q_f|) - |mean(q_f)|) |k_f|,   o = 1, 2, 4, ..., 2^(num_offsets - 1)

    P is the position of the next query and w_f the speed of a pair. The score is the largest of the
    group, in the standard deviations of each query head, from the smallest of the kv_head.

    Deviation: queries are the recorded ones instead of a calibration text's, so nothing has to be
    calibrated; each kv_head of each layer keeps its own entries ("per layer, per head" in public
    code); the prompt is compressed like everything else. Needs a layer with RoPE: without it, or
    where it is not known, all pairs stand still.
    """

    papers = (Paper("TriAttention", "Mao et al.", 2026, "2604.04921"),)

    num_offsets: Annotated[int, Field(ge=1, le=20)] = 17
    """Distances, powers of two from 1."""

    def score(self, context: CompactionContext) -> Scores:
        weights = context.new_scores()
        assert context.query_ring is not None
        group = context.query_ring.shape[3] // context.num_kv_heads
        for layers, rotation in turned_alike(context):
            for window in window_attention(context, layers=layers):
                directions, lengths = self._directions(window, rotation)
                for head in range(group):
                    self._write(
                        window,
                        rotation,
                        directions[:, :, :, head],
                        lengths[:, :, :, head],
                        weights[window.part.place],
                        is_first=head == 0,
                    )
        lowest = weights.masked_fill(~context.is_entry, torch.inf).amin(-1, keepdim=True)
        return Scores(weights.sub_(lowest).masked_fill_(~context.is_entry, 0.0))

    def _directions(
        self, window: WindowAttention, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """What keys and lengths of their pairs are multiplied by.

        Returns:
            [layers, rows, num_kv_heads, group, head_size], and the same with a number of each pair
            (head_size / 2; dimensions that do not turn have none).
        """
        queries, count = window.queries, window.count[:, None, None, None]
        if rotation is None:
            mean = queries.sum(-2) / count
            return mean, mean.new_zeros((*mean.shape[:-1], 0))
        before = rotation.turn(queries, rotation.at(window.positions)[:, None, None], back=True)
        mean = before.sum(-2) / count
        first, second = rotation.pairs(before)
        mean_length = torch.hypot(first, second).sum(-2) / count
        first, second = rotation.pairs(mean)
        spread = mean_length - torch.hypot(first, second)
        context = window.part.context
        at_next = rotation.at(context.end_positions[window.part.rows])
        return rotation.turn(mean, self._mean_turn(rotation, at_next)[:, None, None]), spread

    def _mean_turn(self, rotation: Rotation, at_next: Tensor) -> Tensor:
        """[rows, rotary_dim]: the mean of the turns to P + o, over all o.

        Args:
            at_next: Of the position P.
        """
        # Tables of some models end before the largest offset, so speeds are read from position 1.
        cos, sin = rotation.cos_sin[1].double().chunk(2)
        speeds = torch.atan2(sin, cos)
        offsets = 2.0 ** torch.arange(self.num_offsets, device=speeds.device, dtype=torch.double)
        angles = torch.outer(offsets, speeds)
        cos_mean, sin_mean = angles.cos().mean(0).float(), angles.sin().mean(0).float()
        cos, sin = at_next.chunk(2, dim=-1)
        return torch.cat([cos * cos_mean - sin * sin_mean, sin * cos_mean + cos * sin_mean], -1)

    def _write(
        self,
        window: WindowAttention,
        rotation: Rotation | None,
        direction: Tensor,
        length: Tensor,
        weights: Tensor,
        *,
        is_first: bool,
    ) -> None:
        """The largest score of the heads so far; of one head of each group.

        Args:
            direction: [layers, rows, num_kv_heads, head_size].
            length: [layers, rows, num_kv_heads, rotary_dim / 2 or 0].
            weights: Of these layers and rows.
        """
        part, context = window.part, window.part.context
        scores = torch.empty_like(weights)
        for at in part.entries():
            keys = part.keys(at)
            found = (keys @ direction[..., None]).squeeze(-1)
            if rotation is not None:
                lengths = torch.hypot(*rotation.pairs(keys))
                found += (lengths @ length[..., None]).squeeze(-1)
            scores[..., at] = found
        is_entry = context.is_entry[:, part.rows]
        count = is_entry.sum(-1, keepdim=True).clamp_(min=1)
        scores -= scores.masked_fill(~is_entry, 0.0).sum(-1, keepdim=True) / count
        scores /= deviation(scores, is_entry)
        weights.copy_(scores if is_first else torch.maximum(weights, scores))
