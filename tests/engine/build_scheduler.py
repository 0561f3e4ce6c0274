# SPDX-License-Identifier: Apache-2.0
"""vLLM's Scheduler without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from engine.harness import LLAMA
from engine.symbolic_cache import BLOCK_SIZE

from ems_vllm.config import load_config
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.observation import ObservationSettings

if TYPE_CHECKING:
    from ems_vllm.head_shares import HeadShares

NUM_LAYERS = 4
"""Of the model."""
NUM_HEADS = 3
"""kv_heads of a layer; pages of one do not lie in the same slot of every block."""


def scheduler_for(
    compression: dict[str, Any] | None, num_blocks: int, async_scheduling: bool, **options: Any
) -> Any:
    """A scheduler as the engine core would build it.

    Args:
        compression: Settings; None for plain vLLM. With an allocator that does not deal alike, each
            level of layers is a KV-cache group.
        num_blocks: Size of the pool.
        async_scheduling: Whether it schedules a step ahead.
        options: More of vLLM's EngineArgs.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    specs = specs_of(compression)
    # An engine wants pages for the longest prompt; here, for the longest of the test.
    settings = {k: v for k, v in (compression or {}).items() if k != "prefix_score_tokens"}
    additional = {} if compression is None else {"kv_compression": settings}
    arguments = EngineArgs(
        model=LLAMA,
        block_size=BLOCK_SIZE,
        async_scheduling=async_scheduling,
        additional_config=additional,
        **{
            "max_model_len": (num_blocks - 1) // len(specs) * BLOCK_SIZE,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            **options,
        },
    )
    # Drafts are made up here; no kernel is needed.
    with mock.patch("ems_vllm.cpu_platform.cpu._require_drafting"):
        vllm_config = arguments.create_engine_config()
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    kv_cache_config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec([f"layers of group {group_id}"], spec)
            for group_id, spec in enumerate(specs)
        ],
        hash_block_size=BLOCK_SIZE,
    )
    return vllm_config.scheduler_config.get_scheduler_cls()(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


def specs_of(compression: dict[str, Any] | None) -> list[Any]:
    """KV-cache specs of the groups of a scheduler with these settings."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    plain = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=8, dtype=torch.float32
    )
    config = load_config(compression)
    if config is None:
        return [plain]
    observation = ObservationSettings(
        obs_window=config.obs_window if config.scorer.uses_window else 0,
        score_tokens=config.prefix_score_tokens if config.scorer.uses_global else None,
        ring_rows=config.query_ring_rows,
    )
    return [
        CompressedAttentionSpec.compress(plain, settings, observation)
        for _, settings in config.plan_settings_of(NUM_LAYERS).levels()
    ]


def head_shares_of(compression: dict[str, Any] | None) -> list[list[HeadShares]] | None:
    """By group, what the kv_heads of each layer share; None where all keep as much."""
    config = load_config(compression)
    by_layer = None if config is None else config.allocator.head_shares()
    if config is None or by_layer is None:
        return None
    shares = config.plan_settings_of(NUM_LAYERS).shares
    assert shares is not None
    return [[by_layer[layer] for layer in layers] for layers in shares.levels]
