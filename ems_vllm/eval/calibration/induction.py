# SPDX-License-Identifier: Apache-2.0
"""Heads that find earlier occurrences, from random tokens alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.calibration.fractions import in_proportion, layer_fractions
from ems_vllm.eval.calibration.measure import Calibration, Measure, Sample
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.weights import attention_weights
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

# Times that a sample says the same.
NUM_PERIODS = 4
# Of all kv_heads, the best by each score are whole.
_ECHO_SHARE, _INDUCTION_SHARE = 0.01, 0.14


class Induction(Measure):
    """Attention to earlier occurrences of a token (echo), and to what came after them (induction).

    Random tokens are said four times, so that nothing but finding them again predicts any. The best
    1 % of the kv_heads by echo and 14 % by induction are retrieval heads, and keep everything.

    Args:
        samples: Token ids, NUM_PERIODS times the same behind the special ones.
        num_special: Tokens that begin a text.
    """

    paper = Paper("RazorAttention", "Tang et al.", 2024, "2407.15891")

    def __init__(self, samples: Sequence[Sample], num_special: int) -> None:
        super().__init__(samples)
        self._num_special = num_special

    @torch.inference_mode()
    def of_sample(self, engine: TransformersEngine, sample: Sample) -> torch.Tensor:
        """[2, num_layers, num_kv_heads, group], float32: echo and induction."""
        found: dict[int, torch.Tensor] = {}

        def observe(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
            if layer in engine.compressed_layers:
                found[layer] = scores(queries, keys, engine.scale, self._num_special)

        with observed_by(observe):
            engine.model(torch.tensor([sample], device=engine.model.device), logits_to_keep=1)
        return torch.stack([found[layer] for layer in engine.compressed_layers], dim=1).cpu()

    def result(self, found: Sequence[torch.Tensor], ratios: Sequence[float]) -> Calibration:
        # Of a kv_head, what the best of its group does.
        echo, induction = torch.stack(list(found)).mean(0).amax(-1)
        whole = best(echo, _ECHO_SHARE) | best(induction, _INDUCTION_SHARE)
        of_heads = in_proportion(whole.double(), ratios)
        what = "attention to what came after the same token"
        return Calibration(layer_fractions(of_heads), of_heads, None, induction, what)


def scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, num_special: int
) -> torch.Tensor:
    """Echo and induction of the heads of a layer.

    Args:
        queries: [num_tokens, num_heads, head_size] - of all tokens of a sample.
        keys: [num_kv_heads, num_tokens, head_size].
        scale: Softmax scale.
        num_special: Tokens before the first period.

    Returns:
        [2, num_kv_heads, group], float32: attention to all earlier occurrences, and to what came
        after them, in the mean of the queries from the second period on.
    """
    num_tokens, num_kv_heads = len(queries), keys.shape[0]
    period = (num_tokens - num_special) // NUM_PERIODS
    total = queries.new_zeros((2, num_kv_heads, queries.shape[1] // num_kv_heads)).float()
    start = num_special + period
    position = start
    for weights in attention_weights(queries[start:], keys, scale):
        num_rows = weights.shape[2]
        at = torch.arange(position, position + num_rows, device=keys.device)
        position += num_rows
        for back in range(period, num_tokens, period):
            earlier = at - back
            is_there = earlier >= num_special
            for kind, column in enumerate((earlier, earlier + 1)):
                index = column.clamp(min=0).expand(*weights.shape[:2], -1)[..., None]
                received = weights.gather(-1, index).squeeze(-1)
                total[kind] += received.masked_fill_(~is_there, 0.0).sum(-1)
    return total / (num_tokens - start)


def best(scores_of_heads: torch.Tensor, share: float) -> torch.Tensor:
    """Like the scores, bool: the highest, at least one."""
    flat = scores_of_heads.flatten()
    found = torch.zeros_like(flat, dtype=torch.bool)
    found[flat.topk(max(1, math.ceil(share * len(flat) - 1e-9))).indices] = True
    return found.view_as(scores_of_heads)
