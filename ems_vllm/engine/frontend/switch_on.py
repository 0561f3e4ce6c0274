# SPDX-License-Identifier: Apache-2.0
"""Switches compression on for one engine, once its configuration is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.config import ConfigError, KVCompressionConfig, load_config, settings_of
from ems_vllm.engine.frontend.compatibility import check_compatibility
from ems_vllm.engine.scheduler import SCHEDULERS
from ems_vllm.engine.worker import WORKERS
from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches import registry
from ems_vllm.patches.record import PatchError, Process

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def write_out_settings(engine_args: EngineArgs) -> KVCompressionConfig | None:
    """Validate the settings and write them out in full, so that the config hash covers them."""
    additional = engine_args.additional_config
    config = load_config(additional[CONFIG_KEY])
    if config is None:
        engine_args.additional_config = {
            key: value for key, value in additional.items() if key != CONFIG_KEY
        }
    else:
        engine_args.additional_config = {**additional, CONFIG_KEY: config.to_dict()}
    return config


def activate(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Choose the compressing worker and scheduler, and install the request check.

    Everything else follows from them: the worker overrides the attention backends, whose layers
    get a compressed KV-cache spec, which brings its manager to the scheduler.

    Raises:
        ConfigError: a feature in use cannot work with compression, or this vLLM is not one that
            the patches were written for.
    """
    check_compatibility(vllm_config, config)
    try:
        # All of them, also those that other processes will apply: it is now that one sentence
        # reaches the operator.
        registry.verify()
    except PatchError as error:
        raise ConfigError(str(error)) from None
    cache_config = vllm_config.cache_config
    if cache_config.prefix_cache_retention_interval == 0:
        # By default vLLM keeps sliding windows where it expects the next hit, at the end of a
        # prompt. Here hits end where a compaction begins to write.
        cache_config.prefix_cache_retention_interval = None
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
    registry.apply(Process.FRONTEND)


def check_activated(vllm_config: VllmConfig) -> None:
    """Refuse settings in a configuration that `activate` has never seen.

    Raises:
        ConfigError: the VllmConfig was not made by EngineArgs, so nothing would be compressed.
    """
    config = settings_of(vllm_config)
    if config is not None and vllm_config.parallel_config.worker_cls not in WORKERS.values():
        raise ConfigError(
            f"VllmConfig.additional_config[{CONFIG_KEY!r}] with recipe={config.recipe!r} has no "
            "effect on a VllmConfig that was built by hand: build it with EngineArgs(..., "
            "additional_config=...).create_engine_config(), or set kv_compression to off."
        )
