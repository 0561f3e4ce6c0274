# SPDX-License-Identifier: Apache-2.0
"""What compression cannot be combined with: one table, checked at start-up.

docs/compatibility.md is written from it, and a test walks it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config import ConfigError
from ems_vllm.engine.frontend import obstacles
from ems_vllm.engine.refusal import Refusal
from ems_vllm.keys import STATUS_PLUGIN

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ems_vllm.config import KVCompressionConfig


@dataclass(frozen=True)
class Rule(Refusal):
    """A refusal that the configuration alone decides.

    Attributes:
        value: The setting's value when it is in the way, else None.
        only_with_queries: Whether it is in the way only of a scorer that reads queries.
    """

    value: Callable[[VllmConfig], Any]
    only_with_queries: bool = False


# Decided by the configuration, before anything is loaded.
RULES = (
    Rule(
        "model",
        "its latent attention (MLA) has no keys and values per head",
        "use a model with multi-head or grouped-query attention",
        lambda c: c.model_config.model if c.model_config.use_mla else None,
    ),
    Rule(
        "model",
        "it is an encoder-decoder model",
        "use a decoder-only model",
        lambda c: c.model_config.model if c.model_config.is_encoder_decoder else None,
    ),
    Rule(
        "model",
        "it denoises several tokens at a time and revises them",
        "use an autoregressive model",
        lambda c: c.model_config.model if c.model_config.is_diffusion else None,
    ),
    Rule(
        "runner",
        "only generation keeps a cache across steps",
        "serve a generative model",
        lambda c: c.model_config.runner_type if c.model_config.runner_type != "generate" else None,
    ),
    Rule(
        "speculative_config",
        "the drafting model keeps a cache of its own in the same pool",
        "draft with the method 'ngram'",
        obstacles.drafted_by_a_model,
    ),
    Rule(
        "kv_transfer_config",
        "connectors and offloading expect every column to hold its own tokens",
        "drop --kv-transfer-config and --kv-offloading-size",
        lambda c: c.kv_transfer_config.kv_connector if c.kv_transfer_config else None,
    ),
    Rule(
        "decode_context_parallel_size",
        "columns would be spread over ranks",
        "set it to 1",
        lambda c: obstacles.more_than_one(c.parallel_config.decode_context_parallel_size),
    ),
    Rule(
        "prefill_context_parallel_size",
        "columns would be spread over ranks",
        "set it to 1",
        lambda c: obstacles.more_than_one(c.parallel_config.prefill_context_parallel_size),
    ),
    Rule(
        "ubatch_size",
        "microbatches build their metadata concurrently",
        "drop --enable-dbo and --ubatch-size",
        lambda c: c.parallel_config.num_ubatches if c.parallel_config.use_ubatching else None,
    ),
    Rule(
        "scheduler_cls",
        "compression extends vLLM's own schedulers only",
        "drop --scheduler-cls",
        obstacles.unknown_scheduler,
    ),
    Rule(
        "kv_cache_dtype",
        "the kernels that score and merge read 16- and 32-bit floats and float8 e4m3 with one "
        "scale per layer",
        "use --kv-cache-dtype auto or fp8",
        obstacles.cache_without_kernels,
    ),
    Rule(
        "kv_cache_dtype",
        "the scorer reads queries, and no kernel of this device takes queries of the model's dtype "
        "with keys of the cache's",
        "use --kv-cache-dtype auto (with --dtype bfloat16 or float16 where the checkpoint asks for "
        "a float8 cache)",
        obstacles.queries_without_kernels,
        only_with_queries=True,
    ),
    Rule(
        "kv_cache_dtype_skip_layers",
        "blocks of several sizes would need more memory for scores than is set aside",
        "drop --kv-cache-dtype-skip-layers",
        obstacles.layers_left_unquantised,
    ),
    Rule(
        "kv_sharing_fast_prefill",
        "skipped layers record no queries",
        "drop --kv-sharing-fast-prefill",
        lambda c: c.cache_config.kv_sharing_fast_prefill or None,
    ),
    Rule(
        "hisparse_config",
        "it moves blocks on its own",
        "drop it",
        lambda c: c.attention_config.hisparse_config,
    ),
    # vLLM answers these two with full graphs, whatever mode was asked for.
    Rule(
        "compilation_config.pass_config.fuse_attn_quant",
        "vLLM then runs prompt chunks inside full CUDA graphs, where they could not be scored",
        "set it to false, or use_inductor_graph_partition to true",
        obstacles.full_graphs_by_fusion,
    ),
    Rule(
        "compilation_config.splitting_ops",
        "without attention in it, vLLM runs prompt chunks inside full CUDA graphs, where they "
        "could not be scored",
        "drop it and use FULL_AND_PIECEWISE (vLLM's default) as cudagraph_mode",
        obstacles.full_graphs_by_splitting,
    ),
    Rule(
        "compilation_config.cudagraph_mode",
        "prompt chunks inside a full CUDA graph could not be scored",
        "use FULL_AND_PIECEWISE (vLLM's default), FULL_DECODE_ONLY or PIECEWISE",
        obstacles.mixed_full_graphs,
    ),
    Rule(
        "max_num_batched_tokens",
        "chunks of a prompt must be longer than a decoding step, drafts included",
        "raise it",
        lambda c: obstacles.too_short_for_a_chunk(c, c.scheduler_config.max_num_batched_tokens),
    ),
    Rule(
        "long_prefill_token_threshold",
        "chunks of a prompt must be longer than a decoding step, drafts included",
        "raise it, or set it to 0",
        lambda c: obstacles.too_short_for_a_chunk(
            c, c.scheduler_config.long_prefill_token_threshold or sys.maxsize
        ),
    ),
    Rule(
        "kv_compression_config.prefix_score_tokens",
        "a hit in the prefix cache can be as long as a prompt, and one that is longer than this "
        "would wait for ever",
        "raise it to at least max_model_len, or leave it out",
        obstacles.private_scores_for_part_of_a_prompt,
    ),
    Rule(
        "kv_compression_config.prefill_interval",
        "image tokens of this model see each other, and a compression could fall among them",
        "set it to 0",
        obstacles.prefill_interval_where(lambda c: c.model_config.is_mm_prefix_lm),
    ),
    Rule(
        "kv_compression_config.prefill_interval",
        "what is left of a prompt after a compression may be as short as a block, and must be "
        "longer than a decoding step, drafts included",
        "set it to 0, or draft fewer tokens",
        obstacles.prefill_interval_where(obstacles.drafts_fill_a_block),
    ),
    Rule(
        "kv_compression_config.inspect_requests",
        "they are seen on the status page, which vLLM attaches only where the environment variable "
        "VLLM_PLUGINS names it",
        f"set VLLM_PLUGINS to ems_vllm,{STATUS_PLUGIN} (without a GPU, to "
        f"ems_cpu,ems_vllm,{STATUS_PLUGIN}), or set inspect_requests to 0",
        obstacles.inspected_without_page,
    ),
    Rule(
        "worker_cls",
        "compression extends vLLM's GPU worker and this package's CPU worker only",
        "drop --worker-cls",
        obstacles.unknown_worker,
    ),
    Rule(
        "device",
        "this build of ems-vllm holds no CUDA kernels",
        "rebuild it where nvcc is installed",
        obstacles.device_without_kernels,
    ),
    Rule(
        "disable_hybrid_kv_cache_manager",
        "layers that share a budget unequally need block tables of their own",
        "drop the flag, or choose the allocator uniform",
        obstacles.one_group_of_layers_with_shares,
    ),
    Rule(
        "device",
        "this build of ems-vllm holds no CUDA kernels for this GPU",
        "rebuild it with the GPU's compute capability in TORCH_CUDA_ARCH_LIST",
        obstacles.gpu_without_kernels,
    ),
)
HARMONY_ROLES = Refusal(
    "kv_compression_config.protect",
    "the chats of gpt-oss are rendered without a template, so roles are not found",
    "drop it",
)


def check_compatibility(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: one sentence with the setting, its value, the reason and the remedy.
    """
    for _, error in refusals(vllm_config, config):
        raise error


def refusals(
    vllm_config: VllmConfig, config: KVCompressionConfig
) -> Iterator[tuple[str, ConfigError]]:
    """Every setting that is in the way, with the sentence that refuses it.

    Args:
        vllm_config: vLLM's, whose additional_config holds the settings.
        config: The settings.
    """
    try:
        # Whether the allocator knows a model of so many layers.
        config.plan_settings_of(vllm_config.model_config.get_total_num_hidden_layers())
    except ConfigError as error:
        yield "kv_compression_config.allocator", error
    if config.protect and vllm_config.model_config.hf_config.model_type == "gpt_oss":
        yield HARMONY_ROLES.key, HARMONY_ROLES.error(list(config.protect), config.recipe)
    for rule in RULES:
        if rule.only_with_queries and not config.scorer.reads_queries:
            continue
        try:
            value = rule.value(vllm_config)
        except ConfigError:
            # Of the allocator, as above.
            continue
        if value is not None:
            yield rule.key, rule.error(value, config.recipe)
