# SPDX-License-Identifier: Apache-2.0
"""Measures by what a model attends to of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.calibration.fractions import by_mass, head_fractions, layer_fractions, rounded
from ems_vllm.eval.calibration.measure import Calibration, Measure, Sample
from ems_vllm.eval.calibration.repetition import reconstruction_peaks
from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

# Tokens that every head attends to whatever they are.
_NUM_SINKS = 4


class Repetition(Measure):
    """What repeating a text looks at.

    Args:
        samples: Texts, with the special tokens that begin one.
        instruction: Token ids that tell the model to repeat.
    """

    paper = Paper("KVzip", "Kim et al.", 2025, "2505.23416")

    def __init__(self, samples: Sequence[Sample], instruction: Sample) -> None:
        super().__init__(samples)
        self._instruction = instruction

    def of_sample(self, engine: TransformersEngine, sample: Sample) -> torch.Tensor:
        return reconstruction_peaks(engine, sample, self._instruction).cpu()

    def result(self, found: Sequence[torch.Tensor], ratios: Sequence[float]) -> Calibration:
        of_heads = head_fractions(found, ratios, _NUM_SINKS)
        middle = ratios[len(ratios) // 2]
        shown = torch.tensor(of_heads)[..., len(ratios) // 2]
        what = f"fraction that a kv_head keeps of a prompt of which {middle:.0%} stays"
        return Calibration(layer_fractions(of_heads), of_heads, None, shown, what)


class Mass(Measure):
    """How much of a text holds a share of each layer's accumulated attention.

    Args:
        samples: Texts, with the special tokens that begin one.
        stride: One query in so many counts.
    """

    paper = Paper("PrefixKV", "Wang et al.", 2024, "2412.03409")

    def __init__(self, samples: Sequence[Sample], stride: int = 4) -> None:
        super().__init__(samples)
        self._stride = stride

    def of_sample(self, engine: TransformersEngine, sample: Sample) -> torch.Tensor:
        queries = ScoredQueries(stride=self._stride)
        scores = engine.prefill(sample, 1, [queries]).scores[queries]
        return scores[..., _NUM_SINKS:].mean(1).cpu()

    def result(self, found: Sequence[torch.Tensor], ratios: Sequence[float]) -> Calibration:
        kept = torch.stack([by_mass(of_text, ratios) for of_text in found]).mean(0)
        middle = len(ratios) // 2
        what = f"fraction that a layer keeps of a prompt of which {ratios[middle]:.0%} stays"
        return Calibration(rounded(kept), None, None, kept[:, middle, None], what)
