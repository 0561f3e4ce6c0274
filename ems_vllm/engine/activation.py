# SPDX-License-Identifier: Apache-2.0
"""Switches compression on for one engine, once its configuration is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.config import ConfigError, KVCompressionConfig, load_config
from ems_vllm.engine.compatibility import check_compatibility
from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches import async_llm, input_processor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# The compressing twin of each worker class; the name travels to every worker process.
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "ems_vllm.engine.workers.gpu.CompressedGPUWorker",
    "ems_vllm.platform.worker.ReferenceCPUWorker": (
        "ems_vllm.engine.workers.cpu.CompressedCPUWorker"
    ),
}


def normalize(engine_args: EngineArgs) -> KVCompressionConfig | None:
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
    """Choose the compressing worker and install the request check.

    Everything else follows from the worker: it overrides the attention backends, whose layers get
    a compressed KV-cache spec, which brings its manager to the scheduler.

    Raises:
        ConfigError: a feature in use cannot work with compression.
    """
    check_compatibility(vllm_config, config)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in WORKERS.values():
        worker_cls = WORKERS.get(parallel.worker_cls)
        if worker_cls is None:
            raise ConfigError(
                f"worker_cls={parallel.worker_cls!r} is not supported with KV-cache compression: "
                f"use {' or '.join(WORKERS)}, or switch compression off."
            )
        parallel.worker_cls = worker_cls
    for patch in (*input_processor.PATCHES, *async_llm.PATCHES):
        patch.apply()
