# SPDX-License-Identifier: Apache-2.0
"""Values of settings that are in the way of compression; None where one is not.

One function for each rule of compatibility.RULES that takes more than an attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm import envs

from ems_vllm.config import settings_of
from ems_vllm.engine import kernels
from ems_vllm.engine.cache_dtype import PLAIN_CACHES, cache_dtype, dtype_name
from ems_vllm.engine.scheduler import SCHEDULERS
from ems_vllm.engine.worker import WORKERS
from ems_vllm.keys import STATUS_PLUGIN

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DEVICES_WITH_KERNELS = ("cpu", "cuda")
# Tokens per block where vLLM has not chosen yet: its default.
_BLOCK_SIZE = 16


def more_than_one(value: int) -> int | None:
    return value if value > 1 else None


def drafted_by_a_model(config: VllmConfig) -> str | None:
    method = config.speculative_config.method if config.speculative_config else None
    return None if method == "ngram" else method


def unknown_worker(config: VllmConfig) -> str | None:
    worker_cls = config.parallel_config.worker_cls
    return None if worker_cls in (*WORKERS, *WORKERS.values()) else worker_cls


def unknown_scheduler(config: VllmConfig) -> str | None:
    scheduler_cls = config.scheduler_config.scheduler_cls
    return None if scheduler_cls in (None, *SCHEDULERS) else str(scheduler_cls)


def too_short_for_a_chunk(config: VllmConfig, tokens: int) -> int | None:
    """`tokens` if prompts cannot be cut into chunks of so many that are no decoding steps.

    What is left of a prompt is one chunk where it cannot be cut into two such; see Planner.
    """
    return tokens if tokens < 2 * (1 + config.num_speculative_tokens) + 1 else None


def private_scores_for_part_of_a_prompt(config: VllmConfig) -> int | None:
    settings = settings_of(config)
    tokens = settings.prefix_score_tokens if settings is not None else None
    if tokens is None or tokens >= config.model_config.max_model_len:
        return None
    return tokens


def one_group_of_layers_with_shares(config: VllmConfig) -> bool | None:
    if not config.scheduler_config.disable_hybrid_kv_cache_manager:
        return None
    settings = settings_of(config)
    if settings is None:
        return None
    num_layers = config.model_config.get_total_num_hidden_layers()
    return None if settings.plan_settings_of(num_layers).shares is None else True


def prefill_interval_where(
    is_in_the_way: Callable[[VllmConfig], Any],
) -> Callable[[VllmConfig], int | None]:
    """The interval after which prompts are compressed, where something is in its way."""

    def value(config: VllmConfig) -> int | None:
        settings = settings_of(config)
        interval = 0 if settings is None else settings.prefill_interval
        return interval if interval and is_in_the_way(config) else None

    return value


def inspected_without_page(config: VllmConfig) -> int | None:
    settings = settings_of(config)
    count = 0 if settings is None else settings.inspect_requests
    return count if count and STATUS_PLUGIN not in (envs.VLLM_PLUGINS or ()) else None


def drafts_fill_a_block(config: VllmConfig) -> bool:
    return config.num_speculative_tokens + 1 >= (config.cache_config.block_size or _BLOCK_SIZE)


def device_without_kernels(config: VllmConfig) -> str | None:
    import ems_vllm

    device = config.device_config.device_type
    return device if device == "cuda" and not ems_vllm.build_info()["cuda_archs"] else None


def gpu_without_kernels(config: VllmConfig) -> str | None:
    import ems_vllm

    archs = ems_vllm.build_info()["cuda_archs"]
    if config.device_config.device_type != "cuda" or not archs:
        return None
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if capability is None or any(kernels.covers(arch, *capability) for arch in archs):
        return None
    return f"cuda, compute capability {capability.major}.{capability.minor}"


def cache_without_kernels(config: VllmConfig) -> str | None:
    dtype, device = cache_dtype(config), config.device_config.device_type
    if dtype is None:
        return config.cache_config.cache_dtype
    if not _has_kernels(device) or kernels.without_cache_dtype(device, dtype) is None:
        return None
    return config.cache_config.cache_dtype


def queries_without_kernels(config: VllmConfig) -> str | None:
    dtype, device = cache_dtype(config), config.device_config.device_type
    if dtype is None or not _has_kernels(device):
        return None
    if kernels.without_dtypes(device, dtype_name(config), dtype) is None:
        return None
    return f"{config.cache_config.cache_dtype} with dtype {dtype_name(config)}"


def _has_kernels(device: str) -> bool:
    # A device without any has rules of its own, with better remedies.
    return device in _DEVICES_WITH_KERNELS and bool(kernels.dtype_pairs(device))


def layers_left_unquantised(config: VllmConfig) -> list[str] | None:
    cache = config.cache_config
    return None if cache.cache_dtype in PLAIN_CACHES else cache.kv_cache_dtype_skip_layers or None


def mixed_full_graphs(config: VllmConfig) -> str | None:
    mode = config.compilation_config.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return None
    # FULL_AND_PIECEWISE and FULL_DECODE_ONLY run prompt chunks outside full graphs.
    return None if mode.separate_routine() else mode.name


def full_graphs_by_fusion(config: VllmConfig) -> bool | None:
    compilation = config.compilation_config
    if mixed_full_graphs(config) is None or compilation.splitting_ops:
        return None
    return compilation.pass_config.fuse_attn_quant or None


def full_graphs_by_splitting(config: VllmConfig) -> list[str] | None:
    # None is vLLM's default, which splits at attention, also where FULL was asked for.
    no_split = config.compilation_config.splitting_ops == []
    return [] if no_split and mixed_full_graphs(config) is not None else None
