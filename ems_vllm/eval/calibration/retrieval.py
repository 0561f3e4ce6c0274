# SPDX-License-Identifier: Apache-2.0
"""Heads that look up what is being answered, from facts hidden in texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ems_vllm.eval.calibration.fractions import in_proportion, layer_fractions
from ems_vllm.eval.calibration.measure import Calibration, Measure
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.weights import attention_weights
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

# Of an answer's tokens, those that a model must predict for its attention to count.
_LEAST_RIGHT = 0.5


@dataclass(frozen=True)
class Fact:
    """A prompt that asks for something it holds.

    Attributes:
        prompt: Token ids up to where the answer begins.
        answer: Token ids.
        start: Position in the prompt where the same tokens stand.
    """

    prompt: list[int]
    answer: list[int]
    start: int


class _OfFacts(Measure):
    """Attention while answers are read, by query head."""

    # Which row of `scores` counts, and what it is.
    _row: ClassVar[int]
    _what: ClassVar[str]

    def __init__(self, samples: Sequence[Fact]) -> None:
        super().__init__(samples)

    @torch.inference_mode()
    def of_sample(self, engine: TransformersEngine, sample: Fact) -> torch.Tensor | None:
        """[3, num_layers, num_kv_heads, group], float32: see `scores`; None for a wrong answer."""
        found: dict[int, torch.Tensor] = {}
        # The query of a token is the one that predicts it.
        tokens = [*sample.prompt, *sample.answer[:-1]]

        def observe(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
            if layer in engine.compressed_layers:
                found[layer] = scores(queries[-len(sample.answer) :], keys, engine.scale, sample)

        with observed_by(observe):
            logits = engine.model(
                torch.tensor([tokens], device=engine.model.device),
                logits_to_keep=len(sample.answer),
            ).logits[0]
        answer = torch.tensor(sample.answer, device=logits.device)
        if (logits.argmax(-1) == answer).float().mean() < _LEAST_RIGHT:
            return None
        return torch.stack([found[layer] for layer in engine.compressed_layers], dim=1).cpu()

    def result(self, found: Sequence[torch.Tensor], ratios: Sequence[float]) -> Calibration:
        score = torch.stack(list(found)).mean(0)[self._row]
        of_heads = in_proportion(score.mean(-1), ratios)
        layers = layer_fractions(of_heads)
        return Calibration(layers, of_heads, _ordered(score), score.flatten(1), self._what)


class Retrieval(_OfFacts):
    """How often a head's most attended token is the one that is being answered.

    Paper: Fu et al. 2024, HeadKV, arXiv:2410.19258, whose heads share a budget in proportion to
    this. Ours: answers are read instead of generated, facts are of our own making, and a kv_head
    has the mean of its group.
    """

    paper = Paper("HeadKV", "Fu et al.", 2024, "2410.19258")
    _row = 0
    _what = "share of an answer's tokens that a head looks up"


class Reasoning(_OfFacts):
    """How much of a head's peaks lies on an answer that has to be worked out.

    Paper: Fu et al. 2024, HeadKV-R2, arXiv:2410.19258: of the N tokens that a head attends to most,
    N being the answer's length, those of the answer count with their attention; prompts tell two
    facts and what decides between them. Ours: as for Retrieval.
    """

    paper = Paper("HeadKV-R2", "Fu et al.", 2024, "2410.19258")
    _row = 2
    _what = "attention to an answer, of the tokens that a head attends to most"


class Semantic(_OfFacts):
    """How much attention a head pays to the whole fact while it is answered.

    Paper: Lin et al. 2025, CompressKV, arXiv:2508.02401, its semantic retrieval heads: of each
    layer, the best query heads choose what all kv_heads keep (`scorer: compresskv`). Ours: as for
    Retrieval.
    """

    paper = Paper("CompressKV", "Lin et al.", 2025, "2508.02401")
    _row = 1
    _what = "attention that a head pays to a fact while it is answered"


def scores(queries: torch.Tensor, keys: torch.Tensor, scale: float, fact: Fact) -> torch.Tensor:
    """What the heads of a layer do while an answer is read.

    Args:
        queries: [len(answer), num_heads, head_size] - those that predict it.
        keys: [num_kv_heads, num_tokens, head_size].
        scale: Softmax scale.
        fact: What is answered.

    Returns:
        [3, num_kv_heads, group], float32: the share of the answer's tokens that the most attended
        token of the fact is; the attention to the whole fact, summed over these queries; and the
        part of it by tokens that are among the len(answer) most attended ones of a query.
    """
    length = len(fact.answer)
    span = slice(fact.start, fact.start + length)
    weights = _at_once(queries, keys, scale)
    most = weights.argmax(-1)
    wanted = torch.arange(fact.start, fact.start + length, device=keys.device)
    # Elsewhere in the fact the same token may stand.
    answer = torch.tensor(fact.answer, device=keys.device)
    inside = (most >= span.start) & (most < span.stop)
    token = answer[(most - fact.start).clamp(0, length - 1)]
    hits = inside & (token == answer[wanted - fact.start])
    attended = weights[..., span].sum((-1, -2))
    peaks, at = weights.topk(length, dim=-1)
    peaked = torch.where((at >= span.start) & (at < span.stop), peaks, 0).sum((-1, -2))
    return torch.stack([hits.float().mean(-1), attended, peaked])


def _at_once(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """[num_kv_heads, group, num_queries, num_tokens], of few queries."""
    num_tokens = keys.shape[1]
    rows = [
        torch.nn.functional.pad(part, (0, num_tokens - part.shape[-1]))
        for part in attention_weights(queries, keys, scale)
    ]
    return torch.cat(rows, dim=2)


def _ordered(of_heads: torch.Tensor) -> list[list[int]]:
    """By layer: query heads, the best first.

    Args:
        of_heads: [num_layers, num_kv_heads, group].
    """
    order: list[list[int]] = of_heads.flatten(1).argsort(dim=-1, descending=True).tolist()
    return order
