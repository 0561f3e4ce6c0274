# SPDX-License-Identifier: Apache-2.0
"""A model as a worker knows it, without weights: vLLM's own classes on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import KVCacheSpec

# Arguments that spread a model over processes; one process builds all of it.
_PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
    "enable_expert_parallel",
    "enable_eplb",
    "distributed_executor_backend",
    "nnodes",
    "node_rank",
    "master_addr",
)


@dataclass(frozen=True)
class BareModel:
    """All of a model, in one worker.

    Attributes:
        vllm_config: vLLM's, for one worker, with the block size and layout of the backends.
        module: Its parameters are on the meta device.
        layers: Attention layers by name.
        specs: vLLM's KV-cache specs of the layers that own a cache.
        weight_bytes: Of the parameters, as a checkpoint holds them.
    """

    vllm_config: VllmConfig
    module: torch.nn.Module
    layers: dict[str, Attention]
    specs: dict[str, KVCacheSpec]
    weight_bytes: int


def build(engine_args: EngineArgs, vllm_config: VllmConfig, by_head: bool) -> BareModel:
    """A model with the attention backends that a compressing worker chooses.

    Args:
        engine_args: Of the server.
        vllm_config: Made of them.
        by_head: Whether kv_heads hold different numbers of entries.

    Raises:
        Exception: vLLM's, where its class cannot be built here.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform

    from ems_vllm.engine.attention import override_backends, restore_backends
    from ems_vllm.engine.attention.head_rows import read_by_head

    if vllm_config.parallel_config.world_size_across_dp > 1:
        vllm_config = _of_one_worker(engine_args)
    read_by_head(by_head)
    override_backends()
    try:
        with set_current_vllm_config(vllm_config), _process_groups(), _no_shared_parts():
            module = _on_meta_device(vllm_config)
            current_platform.update_block_size_for_backend(vllm_config)
            context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
            specs = {
                name: layer.get_kv_cache_spec(vllm_config)
                for name, layer in context.items()
                if isinstance(layer, AttentionLayerBase)
                and getattr(layer, "kv_sharing_target_layer_name", None) is None
            }
            _resolve_layout(vllm_config, specs)
    finally:
        restore_backends()
        read_by_head(False)
    return BareModel(
        vllm_config=vllm_config,
        module=module,
        layers={name: layer for name, layer in context.items() if isinstance(layer, Attention)},
        specs={name: spec for name, spec in specs.items() if spec is not None},
        weight_bytes=sum(one.numel() * one.element_size() for one in module.parameters()),
    )


@contextmanager
def _no_shared_parts() -> Iterator[None]:
    """vLLM's models share rotary embeddings within a process; another one's must have numbers."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    kept = dict(_ROPE_DICT)
    _ROPE_DICT.clear()
    try:
        yield
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(kept)


def _of_one_worker(engine_args: EngineArgs) -> VllmConfig:
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(engine_args)
        if field.name in _PARALLEL or field.name.startswith("data_parallel_")
    }
    additional = {k: v for k, v in (engine_args.additional_config or {}).items() if k != CONFIG_KEY}
    return dataclasses.replace(
        engine_args, **defaults, additional_config=additional
    ).create_engine_config()


def _on_meta_device(vllm_config: VllmConfig) -> torch.nn.Module:
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
        return initialize_model(vllm_config)


def _resolve_layout(vllm_config: VllmConfig, specs: dict[str, Any]) -> None:
    """As the engine core does once its workers know their backends."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends import utils

    supported = utils.get_supported_kv_cache_layouts(get_current_attn_backends(vllm_config))
    names = [[layout.name for layout in supported]]
    layout = utils.resolve_kv_cache_layout(vllm_config, names, [s for s in specs.values() if s])
    utils.record_kv_cache_layout(vllm_config.cache_config, layout.name)


@contextmanager
def _process_groups() -> Iterator[None]:
    """Of a single rank; within vLLM's configuration only."""
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_open_port

    address = f"tcp://127.0.0.1:{get_open_port()}"
    parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
    try:
        parallel_state.ensure_model_parallel_initialized(1, 1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
