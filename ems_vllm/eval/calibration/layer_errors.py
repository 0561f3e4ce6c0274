# SPDX-License-Identifier: Apache-2.0
"""Layers whose output a small cache changes most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ems_vllm.config import RequestOptions, load_config
from ems_vllm.eval.calibration.fractions import in_proportion, layer_fractions
from ems_vllm.eval.calibration.measure import Calibration, Measure, Sample
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.attention_errors import AttentionErrors, QueryRecorder
from ems_vllm.ops import reference_operators
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

# Tokens after a text whose attention is compared.
_NUM_ASKED = 32
# Of a layer, as a multiple of the mean.
_MOST = 3.0
# 32 entries beside the window, by SnapKV.
_SMALL_CACHE = {
    "recipe": "snapkv",
    "budget": 32,
    "recent_window": 8,
    "obs_window": 8,
    "recompress_interval": 0,
    "min_blocks_saved": 1,
}


class LayerErrors(Measure):
    """How much the output of a layer's attention changes if every layer keeps 32 entries.

    Paper: Lin et al. 2025, CompressKV, arXiv:2508.02401: layers share a budget in proportion to
    this, none more than three times the mean. Ours: entries are chosen as SnapKV does, the next
    tokens of a text are asked instead of generated ones, and what every layer keeps anyway is the
    allocator's `uniform_share`.
    """

    paper = Paper("CompressKV", "Lin et al.", 2025, "2508.02401")

    def of_sample(self, engine: TransformersEngine, sample: Sample) -> torch.Tensor:
        """[num_layers], float32."""
        config = load_config(_SMALL_CACHE)
        assert config is not None
        prompt = engine.prefill(sample[:-_NUM_ASKED], config.obs_window)
        full = engine.request(prompt, config, RequestOptions(enabled=False))
        recorder = QueryRecorder(engine.compressed_layers)
        with observed_by(recorder):
            full.extend(sample[-_NUM_ASKED:])
        errors = AttentionErrors(engine, recorder.queries(), full)
        small = engine.request(prompt, config, RequestOptions())
        with reference_operators():
            small.compress()
        return errors.by_layer(*small.entries(), _NUM_ASKED).cpu()

    def result(self, found: Sequence[torch.Tensor], ratios: Sequence[float]) -> Calibration:
        error = torch.stack([one / one.sum() for one in found]).mean(0)[:, None]
        fractions = layer_fractions(in_proportion(error, ratios, _MOST))
        what = "share of the errors that 32 entries make"
        return Calibration(fractions, None, None, error, what)
