# SPDX-License-Identifier: Apache-2.0
"""What of vLLM is on, and what compression makes of it, by the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ems_vllm.config import KVCompressionConfig
from ems_vllm.config.request import RequestOptions
from ems_vllm.doctor.start.check import Check, degraded, ok

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Where the keys of refusals belong among these checks; other keys are checks of their own.
CHECK_OF = {
    "runner": "model",
    "speculative_config": "drafts",
    "kv_transfer_config": "connectors",
    "decode_context_parallel_size": "parallelism",
    "prefill_context_parallel_size": "parallelism",
    "ubatch_size": "parallelism",
    "scheduler_cls": "scheduling",
    "kv_cache_dtype": "dtypes",
    "kv_cache_dtype_skip_layers": "dtypes",
    "kv_sharing_fast_prefill": "prompts",
    "max_num_batched_tokens": "prompts",
    "long_prefill_token_threshold": "prompts",
    "kv_compression_config.prefill_interval": "prompts",
    "compilation_config.pass_config.fuse_attn_quant": "CUDA graphs",
    "compilation_config.splitting_ops": "CUDA graphs",
    "compilation_config.cudagraph_mode": "CUDA graphs",
    "kv_compression_config.prefix_score_tokens": "prefix cache",
    "kv_compression_config.allocator": "budget",
    "disable_hybrid_kv_cache_manager": "budget",
    "worker_cls": "platform",
    "device": "build",
    "kv_compression_config.protect": "protect",
}


def features(
    vllm_config: VllmConfig,
    config: KVCompressionConfig,
    has_metrics: bool,
    with_budget: bool = True,
) -> Iterator[Check]:
    """One check for each feature, on or off.

    Args:
        vllm_config: vLLM's, complete.
        config: Settings of compression.
        has_metrics: Whether the server counts what it does.
        with_budget: Whether to say what is kept; not of an allocator that does not fit the model.
    """
    from ems_vllm.engine.cache_dtype import cache_dtype, dtype_name

    model = vllm_config.model_config
    kinds = ", ".join(model.architectures)
    yield ok("model", f"{kinds}, {model.max_model_len:,} tokens at most")
    yield ok("dtypes", f"{dtype_name(vllm_config)}, cache {cache_dtype(vllm_config)}")
    yield ok("model runner", "V2" if vllm_config.use_v2_model_runner else "V1")
    yield ok("parallelism", _parallelism(vllm_config))
    yield _scheduling(vllm_config)
    yield _prefix_cache(vllm_config, config)
    yield _prompts(vllm_config, config)
    yield _graphs(vllm_config, config)
    drafts = vllm_config.speculative_config
    yield ok("drafts", "none" if drafts is None else f"{drafts.method}, accepted before scoring")
    yield ok("LoRA", "off" if vllm_config.lora_config is None else "on, and stays on")
    yield ok("connectors", "none" if vllm_config.kv_transfer_config is None else "in use")
    if with_budget:
        yield _budget(vllm_config, config)
    if config.when == "pressure":
        yield degraded(
            "load",
            "requests are compressed only where the pool has no room for all, so an answer depends "
            "on what else runs",
            "set when to always where that must not be",
        )
    if config.guard_action == "dense":
        yield degraded(
            "guard",
            "requests keep their whole cache while too many of the measured ones diverge, so an "
            "answer depends on those before it",
            "set guard_action to report where that must not be",
        )
    if has_metrics:
        yield ok("metrics", "on: /metrics and the answers' usage say what was kept")
    else:
        yield degraded(
            "metrics",
            "off: only the log and the answers' usage will say what was compressed",
            "drop --disable-log-stats",
        )


def _parallelism(vllm_config: VllmConfig) -> str:
    parallel = vllm_config.parallel_config
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "data": parallel.data_parallel_size,
    }
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    named += ["expert"] if parallel.enable_expert_parallel else []
    return ", ".join(named) or "one worker"


def _scheduling(vllm_config: VllmConfig) -> Check:
    scheduler = vllm_config.scheduler_config
    how = "asynchronous" if scheduler.async_scheduling else "synchronous"
    return ok("scheduling", f"{how}, {scheduler.max_num_seqs:,} requests at a time at most")


def _prefix_cache(vllm_config: VllmConfig, config: KVCompressionConfig) -> Check:
    if not vllm_config.cache_config.enable_prefix_caching:
        return ok("prefix cache", "off")
    if config.is_neutral_to_hits:
        return ok("prefix cache", "on; hits change no answer")
    return degraded(
        "prefix cache",
        f"on, and with global_queries={config.global_queries!r} hits change which queries score, "
        "so an answer may depend on what was asked before",
        "set global_queries to a number",
    )


def _prompts(vllm_config: VllmConfig, config: KVCompressionConfig) -> Check:
    scheduler = vllm_config.scheduler_config
    chunks = "in chunks" if scheduler.enable_chunked_prefill else "whole"
    told = f"{chunks}, {scheduler.max_num_batched_tokens:,} tokens a step"
    if config.prefill_interval:
        return degraded(
            "prompts",
            f"{told}, compressed every {config.prefill_interval:,} tokens: what stands far back in "
            "one is often lost",
            "set prefill_interval to 0 where the pool holds whole prompts",
        )
    return ok("prompts", f"{told}, compressed at their end")


def _graphs(vllm_config: VllmConfig, config: KVCompressionConfig) -> Check:
    mode = vllm_config.compilation_config.cudagraph_mode
    if vllm_config.device_config.device_type != "cuda":
        return ok("CUDA graphs", "none on this device")
    if mode is None or not mode.max_cudagraph_mode().value:
        remedy = "drop --enforce-eager, and leave cudagraph_mode to vLLM"
        return degraded("CUDA graphs", "none: decoding is launched kernel by kernel", remedy)
    if config.allocator.deals_to_heads and vllm_config.num_speculative_tokens:
        return degraded(
            "CUDA graphs",
            f"{mode.name}, but kv_heads that share unequally keep batches with drafts out of full "
            "graphs",
            "draft nothing, or choose an allocator that deals to layers alone",
        )
    return ok("CUDA graphs", mode.name)


def _budget(vllm_config: VllmConfig, config: KVCompressionConfig) -> Check:
    longest = vllm_config.model_config.max_model_len
    size = f"ratio {config.ratio}" if config.budget is None else f"budget {config.budget:,}"
    shortest = shortest_compressed(vllm_config, config)
    if shortest is None:
        return degraded(
            "budget",
            f"{size}: no request of at most {longest:,} tokens is ever compressed",
            "lower the budget or raise --max-model-len",
        )
    return ok(
        "budget",
        f"{size}, allocator {config.allocator.name()}; prompts of about {shortest:,} tokens or "
        "more are compressed",
    )


def shortest_compressed(vllm_config: VllmConfig, config: KVCompressionConfig) -> int | None:
    """Tokens of the shortest prompt that is compressed, to a block; None where none is."""
    model, block_size = vllm_config.model_config, vllm_config.cache_config.block_size or 16
    settings = config.plan_settings_of(model.get_total_num_hidden_layers())
    # A request has at least one token to generate.
    lengths = [*range(block_size, model.max_model_len, block_size), model.max_model_len - 1]
    for length in lengths:
        for _, of_level in settings.levels():
            if of_level.plan(length, block_size, RequestOptions()).compresses_prompt:
                return length
    return None
