# SPDX-License-Identifier: Apache-2.0
"""What the cache will hold: as a worker sizes it, where the memory is known or can be reckoned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ems_vllm.config import KVCompressionConfig
from ems_vllm.config.request import RequestOptions
from ems_vllm.doctor.start.bare_model import BareModel
from ems_vllm.doctor.start.check import Capacity, Check, degraded, ok, refused, unknown
from ems_vllm.doctor.start.layers import layer_choice, specs_of_worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from ems_vllm.engine.worker.memory import Footprint

# Bytes of a GPU for its context, activations and CUDA graphs, where nobody has measured them
# (ours).
_UNMEASURED_BYTES = 2 << 30
_GIVE = "give --kv-cache-memory-bytes, the bytes for the cache on each GPU"
_LOG = "the start-up log says it"


@dataclass(frozen=True)
class _Memory:
    """Bytes for the cache on a worker, and for what compression holds beside it."""

    num_bytes: int
    is_estimate: bool


def check_memory(
    bare: BareModel, vllm_config: VllmConfig, config: KVCompressionConfig
) -> tuple[Check, Capacity | None]:
    """How many requests of max_model_len fit, dense and compressed.

    Args:
        bare: The model, all of it.
        vllm_config: Of the server, which may spread it.
        config: Settings of compression.
    """
    memory = _memory(bare, vllm_config)
    if memory is None:
        return unknown("memory", "no GPU is here whose memory could be reckoned with", _GIVE), None
    if memory.num_bytes <= 0:
        return _no_room(bare, vllm_config), None
    specs = _specs_of_ranks(bare, vllm_config, config)
    if specs is None:
        finding = "layers with recurrent states are spread over ranks"
        return unknown("memory", f"not known before the start: {finding}", _LOG), None
    return _fit(bare, vllm_config, config, specs, memory)


def _no_room(bare: BareModel, vllm_config: VllmConfig) -> Check:
    weights = bare.weight_bytes / vllm_config.parallel_config.world_size / 2**30
    finding = f"by arithmetic, {weights:.1f} GiB of weights a worker leave nothing for the cache"
    is_offloaded = vllm_config.offload_config.uva.cpu_offload_gb > 0
    if vllm_config.model_config.quantization is not None or is_offloaded:
        # Some methods make the weights smaller as they load them.
        return unknown("memory", finding, "use more GPUs if the server does not start")
    return refused("memory", finding, "use more GPUs, or a quantised checkpoint")


def _memory(bare: BareModel, vllm_config: VllmConfig) -> _Memory | None:
    given = vllm_config.cache_config.kv_cache_memory_bytes
    if given is not None:
        return _Memory(given, is_estimate=False)
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    total = current_platform.get_device_total_memory()
    parallel = vllm_config.parallel_config
    weights = bare.weight_bytes // parallel.world_size
    usable = int(total * vllm_config.cache_config.gpu_memory_utilization)
    return _Memory(usable - weights - _UNMEASURED_BYTES, is_estimate=True)


def _specs_of_ranks(
    bare: BareModel, vllm_config: VllmConfig, config: KVCompressionConfig
) -> list[dict[str, KVCacheSpec]] | None:
    """Specs of the first rank of every pipeline stage; None where arithmetic cannot tell."""
    from vllm.distributed.utils import get_pp_indices
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.kv_cache_interface import AttentionSpec

    parallel = vllm_config.parallel_config
    num_ranks, num_stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    declared = specs_of_worker(bare, layer_choice(bare, config), config)
    if num_ranks > 1:
        if not all(isinstance(spec, AttentionSpec) for spec in declared.values()):
            return None
        declared = {
            name: replace(spec, num_kv_heads=max(1, spec.num_kv_heads // num_ranks))
            for name, spec in declared.items()
        }
    num_layers = bare.vllm_config.model_config.get_total_num_hidden_layers()
    spans = [get_pp_indices(num_layers, stage, num_stages) for stage in range(num_stages)]
    return [
        {name: spec for name, spec in declared.items() if start <= extract_layer_index(name) < end}
        for start, end in spans
    ]


def _fit(
    bare: BareModel,
    vllm_config: VllmConfig,
    config: KVCompressionConfig,
    specs: list[dict[str, KVCacheSpec]],
    memory: _Memory,
) -> tuple[Check, Capacity | None]:
    from ems_vllm.engine.worker.request_fit import request_fit
    from ems_vllm.vllm_versions import kv_cache_configs

    footprints = [_footprint(bare, vllm_config, config, of_stage) for of_stage in specs]
    cache = [footprint.reduce(memory.num_bytes) for footprint in footprints]
    try:
        found, *_ = kv_cache_configs(bare.vllm_config, specs, cache)
    except ValueError as error:
        sentence = " ".join(str(error).split())
        if memory.is_estimate:
            remedy = "the server measures it at start-up; lower --max-model-len if it refuses"
            return degraded("memory", f"by arithmetic: {sentence}", remedy), None
        return refused("memory", sentence), None
    longest = bare.vllm_config.model_config.max_model_len
    fit = request_fit(found, longest, bare.vllm_config)
    assert fit is not None
    beside_prompt = found.num_blocks - 1 - _coming_in(found, fit.columns.dense, longest)
    capacity = Capacity(
        is_estimate=memory.is_estimate,
        cache_bytes=memory.num_bytes,
        beside_bytes=footprints[0].total_bytes(found.num_blocks),
        num_blocks=found.num_blocks - 1,
        max_model_len=longest,
        dense=fit.dense,
        compressed=fit.compressed,
        with_one_coming_in=1 + beside_prompt // fit.columns.compressed if beside_prompt >= 0 else 0,
        dense_blocks=fit.columns.dense,
        compressed_blocks=fit.columns.compressed,
    )
    return ok("memory", "; ".join(_told(capacity))), capacity


def _coming_in(found: KVCacheConfig, dense_blocks: int, longest: int) -> int:
    """Blocks of the longest prompt while it is processed: dense, unless it is compressed then."""
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

    blocks = dense_blocks
    for group in found.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, CompressedAttentionSpec):
            plan = spec.settings.plan(longest - 1, spec.block_size, RequestOptions())
            if plan.num_within_prompt:
                blocks += plan.max_replay_columns(longest - 1) - -(-longest // spec.block_size)
    return blocks


def _told(capacity: Capacity) -> Iterator[str]:
    about = "about " if capacity.is_estimate else ""
    yield (
        f"{about}{capacity.cache_bytes / 2**30:.1f} GiB a worker, "
        f"{capacity.beside_bytes / 2**20:,.0f} MiB of it beside the cache"
    )
    yield f"{about}{capacity.num_blocks:,} blocks"
    yield (
        f"requests of {capacity.max_model_len:,} tokens that fit: {about}"
        f"{shown(capacity.dense)} dense, {shown(capacity.compressed)} compressed "
        f"({capacity.with_one_coming_in:,} while the prompt of one comes in)"
    )


def shown(fit: float) -> str:
    """How many fit: whole ones, but where a part of one makes a difference."""
    return f"{fit:.1f}" if fit < 10 else f"{int(fit):,}"


def _footprint(
    bare: BareModel,
    vllm_config: VllmConfig,
    config: KVCompressionConfig,
    specs: dict[str, KVCacheSpec],
) -> Footprint:
    from ems_vllm.engine.worker.memory import Footprint
    from ems_vllm.policies.policy import Policy

    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    sizes = compilation.cudagraph_capture_sizes or [0]
    return Footprint(
        config=config,
        policy=Policy.from_config(config),
        max_model_len=bare.vllm_config.model_config.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_reqs=max(scheduler.max_num_seqs, *sizes),
        query_itemsize=bare.vllm_config.model_config.dtype.itemsize,
        num_heads={name: layer.num_heads // num_ranks for name, layer in bare.layers.items()},
        specs=specs,
    )
