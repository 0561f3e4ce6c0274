# SPDX-License-Identifier: Apache-2.0
"""The KV-cache specs that a worker declares: those of the compressed layers say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.observation import ObservationSettings, score_tokens
from ems_vllm.engine.worker.layer_settings import LayersDiffer, by_layer
from ems_vllm.engine.worker.refusals import LAYER_SHARES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.engine.worker.layer_choice import LayerChoice
    from ems_vllm.plan import PlanSettings


def declared_specs(
    specs: Mapping[str, KVCacheSpec],
    choice: LayerChoice,
    config: KVCompressionConfig,
    vllm_config: VllmConfig,
) -> dict[str, KVCacheSpec]:
    """Specs by layer, after the choice.

    Args:
        specs: vLLM's, by layer.
        choice: Which of them are compressed.
        config: Settings of the server.
        vllm_config: vLLM's.

    Raises:
        ConfigError: the allocator deals to other layers than are compressed.
    """
    settings = config.plan_settings_of(vllm_config.model_config.get_total_num_hidden_layers())
    try:
        of_layers = by_layer(settings, specs, choice.compressed)
    except LayersDiffer as error:
        raise LAYER_SHARES.error(config.allocator.name(), config.recipe, reason=error) from None
    return {
        name: _compressed(spec, of_layers[name], config, vllm_config) if name in of_layers else spec
        for name, spec in specs.items()
    }


def _compressed(
    spec: FullAttentionSpec,
    settings: PlanSettings,
    config: KVCompressionConfig,
    vllm_config: VllmConfig,
) -> CompressedAttentionSpec:
    scorer = config.scorer
    tokens = None
    if scorer.uses_global:
        tokens = score_tokens(
            config.prefix_score_tokens,
            settings.most_entries(spec.block_size, vllm_config.model_config.max_model_len),
            vllm_config.scheduler_config.max_num_batched_tokens,
        )
    observation = ObservationSettings(
        obs_window=config.obs_window if scorer.uses_window else 0,
        score_tokens=tokens,
        ring_rows=config.query_ring_rows,
    )
    return CompressedAttentionSpec.compress(spec, settings, observation)
