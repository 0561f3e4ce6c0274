# SPDX-License-Identifier: Apache-2.0
"""What compression cannot be combined with: one table, checked at start-up.

docs/compatibility.md is written from it, and a test walks it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config import ConfigError
from ems_vllm.engine import kernels
from ems_vllm.engine.active_config import active_config
from ems_vllm.engine.group.cache_scales import FLOAT8_CACHES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ems_vllm.config import KVCompressionConfig


# The compressing twin of each worker class; the name travels to every worker process.
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "ems_vllm.engine.worker.gpu.CompressedGPUWorker",
    "ems_vllm.platform.worker.ReferenceCPUWorker": (
        "ems_vllm.engine.worker.cpu.CompressedCPUWorker"
    ),
}

# The compressing schedulers, without and with asynchronous scheduling.
SCHEDULERS = (
    "ems_vllm.engine.scheduler.schedulers.CompressingScheduler",
    "ems_vllm.engine.scheduler.schedulers.CompressingAsyncScheduler",
)

# vLLM's names of caches that are not quantised.
_PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
_DEVICES_WITH_KERNELS = ("cpu", "cuda")
# Tokens per block where vLLM has not chosen yet: its default.
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Refusal:
    """Something that compression cannot work with.

    Attributes:
        key: The setting, as the operator knows it.
        reason: Why it cannot work.
        remedy: What to do.
    """

    key: str
    reason: str
    remedy: str

    def error(self, value: Any, recipe: str, **details: Any) -> ConfigError:
        """The one sentence: setting, value, reason and remedy.

        Args:
            value: What the setting is.
            recipe: The recipe in use.
            details: Fill the names in braces of `reason` and `remedy`.
        """
        return ConfigError(
            f"{self.key}={value!r} cannot be combined with kv_compression={recipe!r}: "
            f"{self.reason.format(**details)}; {self.remedy.format(**details)}, or set "
            "kv_compression to off."
        )


@dataclass(frozen=True)
class Rule(Refusal):
    """A refusal that the configuration alone decides.

    Attributes:
        value: The setting's value when it is in the way, else None.
        only_with_queries: Whether it is in the way only of a scorer that reads queries.
    """

    value: Callable[[VllmConfig], Any]
    only_with_queries: bool = False


def _more_than_one(value: int) -> int | None:
    return value if value > 1 else None


def _drafted_by_a_model(config: VllmConfig) -> str | None:
    method = config.speculative_config.method if config.speculative_config else None
    return None if method == "ngram" else method


def _unknown_worker(config: VllmConfig) -> str | None:
    worker_cls = config.parallel_config.worker_cls
    return None if worker_cls in (*WORKERS, *WORKERS.values()) else worker_cls


def _unknown_scheduler(config: VllmConfig) -> str | None:
    scheduler_cls = config.scheduler_config.scheduler_cls
    return None if scheduler_cls in (None, *SCHEDULERS) else str(scheduler_cls)


def _too_short_for_a_chunk(config: VllmConfig, tokens: int) -> int | None:
    """`tokens` if prompts cannot be cut into chunks of so many that are no decoding steps.

    What is left of a prompt is one chunk where it cannot be cut into two such; see Planner.
    """
    return tokens if tokens < 2 * (1 + config.num_speculative_tokens) + 1 else None


def _private_scores_for_part_of_a_prompt(config: VllmConfig) -> int | None:
    settings = active_config(config)
    tokens = settings.prefix_score_tokens if settings is not None else None
    if tokens is None or tokens >= config.model_config.max_model_len:
        return None
    return tokens


def _one_group_of_layers_with_shares(config: VllmConfig) -> bool | None:
    if not config.scheduler_config.disable_hybrid_kv_cache_manager:
        return None
    settings = active_config(config)
    if settings is None:
        return None
    num_layers = config.model_config.get_total_num_hidden_layers()
    return None if settings.plan_settings_of(num_layers).shares is None else True


def _prefill_interval_where(
    is_in_the_way: Callable[[VllmConfig], Any],
) -> Callable[[VllmConfig], int | None]:
    """The interval after which prompts are compressed, where something is in its way."""

    def value(config: VllmConfig) -> int | None:
        settings = active_config(config)
        interval = 0 if settings is None else settings.prefill_interval
        return interval if interval and is_in_the_way(config) else None

    return value


def _drafts_fill_a_block(config: VllmConfig) -> bool:
    return config.num_speculative_tokens + 1 >= (config.cache_config.block_size or _BLOCK_SIZE)


def _device_without_kernels(config: VllmConfig) -> str | None:
    import ems_vllm

    device = config.device_config.device_type
    return device if device == "cuda" and not ems_vllm.build_info()["cuda_archs"] else None


def _gpu_without_kernels(config: VllmConfig) -> str | None:
    import ems_vllm

    archs = ems_vllm.build_info()["cuda_archs"]
    if config.device_config.device_type != "cuda" or not archs:
        return None
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if capability is None or any(covers(arch, *capability) for arch in archs):
        return None
    return f"cuda, compute capability {capability.major}.{capability.minor}"


def covers(arch: str, major: int, minor: int) -> bool:
    """Whether kernels for an architecture run on a GPU.

    Args:
        arch: In torch's notation: 9.0a is for 9.0 alone, 10.0f and 8.0 also for later GPUs of the
            same major version, and 9.0+PTX for all later ones.
        major, minor: Compute capability of the GPU.
    """
    number, _, ptx = arch.partition("+")
    built = tuple(int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return built == (major, minor)
    if ptx and not number.endswith("f"):
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def _cache_dtype(config: VllmConfig) -> str | None:
    """torch's name of the dtype of the cache; None for a format that no operator knows."""
    name = config.cache_config.cache_dtype
    if name in FLOAT8_CACHES:
        return "float8_e4m3fn"
    if name == "auto":
        return dtype_name(config)
    return name if name in _PLAIN_CACHES else None


def dtype_name(config: VllmConfig) -> str:
    """torch's name of the dtype of a model, which is that of its queries."""
    return str(config.model_config.dtype).removeprefix("torch.")


def unquantised_cache(config: VllmConfig) -> str:
    """Value of --kv-cache-dtype for a cache in the dtype of the queries.

    "auto" follows a checkpoint that asks for float8, and vLLM has no name for a cache of float32.
    """
    name = dtype_name(config)
    return name if name in ("bfloat16", "float16") else "bfloat16 --dtype bfloat16"


def _cache_without_kernels(config: VllmConfig) -> str | None:
    dtype, device = _cache_dtype(config), config.device_config.device_type
    if dtype is None:
        return config.cache_config.cache_dtype
    if not _has_kernels(device) or kernels.without_cache_dtype(device, dtype) is None:
        return None
    return config.cache_config.cache_dtype


def _queries_without_kernels(config: VllmConfig) -> str | None:
    dtype, device = _cache_dtype(config), config.device_config.device_type
    if dtype is None or not _has_kernels(device):
        return None
    if kernels.without_dtypes(device, dtype_name(config), dtype) is None:
        return None
    return f"{config.cache_config.cache_dtype} with dtype {dtype_name(config)}"


def _has_kernels(device: str) -> bool:
    # A device without any has rules of its own, with better remedies.
    return device in _DEVICES_WITH_KERNELS and bool(kernels.dtype_pairs(device))


def _layers_left_unquantised(config: VllmConfig) -> list[str] | None:
    cache = config.cache_config
    return None if cache.cache_dtype in _PLAIN_CACHES else cache.kv_cache_dtype_skip_layers or None


def _mixed_full_graphs(config: VllmConfig) -> str | None:
    mode = config.compilation_config.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return None
    # FULL_AND_PIECEWISE and FULL_DECODE_ONLY run prompt chunks outside full graphs.
    return None if mode.separate_routine() else mode.name


def _full_graphs_by_fusion(config: VllmConfig) -> bool | None:
    compilation = config.compilation_config
    if _mixed_full_graphs(config) is None or compilation.splitting_ops:
        return None
    return compilation.pass_config.fuse_attn_quant or None


def _full_graphs_by_splitting(config: VllmConfig) -> list[str] | None:
    # None is vLLM's default, which splits at attention, also where FULL was asked for.
    no_split = config.compilation_config.splitting_ops == []
    return [] if no_split and _mixed_full_graphs(config) is not None else None


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
        _drafted_by_a_model,
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
        lambda c: _more_than_one(c.parallel_config.decode_context_parallel_size),
    ),
    Rule(
        "prefill_context_parallel_size",
        "columns would be spread over ranks",
        "set it to 1",
        lambda c: _more_than_one(c.parallel_config.prefill_context_parallel_size),
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
        _unknown_scheduler,
    ),
    Rule(
        "kv_cache_dtype",
        "the kernels that score and merge read 16- and 32-bit floats and float8 e4m3 with one "
        "scale per layer",
        "use --kv-cache-dtype auto or fp8",
        _cache_without_kernels,
    ),
    Rule(
        "kv_cache_dtype",
        "the scorer reads queries, and no kernel of this device takes queries of the model's dtype "
        "with keys of the cache's",
        "use --kv-cache-dtype auto (with --dtype bfloat16 or float16 where the checkpoint asks for "
        "a float8 cache)",
        _queries_without_kernels,
        only_with_queries=True,
    ),
    Rule(
        "kv_cache_dtype_skip_layers",
        "blocks of several sizes would need more memory for scores than is set aside",
        "drop --kv-cache-dtype-skip-layers",
        _layers_left_unquantised,
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
        _full_graphs_by_fusion,
    ),
    Rule(
        "compilation_config.splitting_ops",
        "without attention in it, vLLM runs prompt chunks inside full CUDA graphs, where they "
        "could not be scored",
        "drop it and use FULL_AND_PIECEWISE (vLLM's default) as cudagraph_mode",
        _full_graphs_by_splitting,
    ),
    Rule(
        "compilation_config.cudagraph_mode",
        "prompt chunks inside a full CUDA graph could not be scored",
        "use FULL_AND_PIECEWISE (vLLM's default), FULL_DECODE_ONLY or PIECEWISE",
        _mixed_full_graphs,
    ),
    Rule(
        "max_num_batched_tokens",
        "chunks of a prompt must be longer than a decoding step, drafts included",
        "raise it",
        lambda c: _too_short_for_a_chunk(c, c.scheduler_config.max_num_batched_tokens),
    ),
    Rule(
        "long_prefill_token_threshold",
        "chunks of a prompt must be longer than a decoding step, drafts included",
        "raise it, or set it to 0",
        lambda c: _too_short_for_a_chunk(
            c, c.scheduler_config.long_prefill_token_threshold or sys.maxsize
        ),
    ),
    Rule(
        "kv_compression_config.prefix_score_tokens",
        "a hit in the prefix cache can be as long as a prompt, and one that is longer than this "
        "would wait for ever",
        "raise it to at least max_model_len, or leave it out",
        _private_scores_for_part_of_a_prompt,
    ),
    Rule(
        "kv_compression_config.prefill_interval",
        "image tokens of this model see each other, and a compression could fall among them",
        "set it to 0",
        _prefill_interval_where(lambda c: c.model_config.is_mm_prefix_lm),
    ),
    Rule(
        "kv_compression_config.prefill_interval",
        "what is left of a prompt after a compression may be as short as a block, and must be "
        "longer than a decoding step, drafts included",
        "set it to 0, or draft fewer tokens",
        _prefill_interval_where(_drafts_fill_a_block),
    ),
    Rule(
        "worker_cls",
        "compression extends vLLM's GPU worker and this package's CPU worker only",
        "drop --worker-cls",
        _unknown_worker,
    ),
    Rule(
        "device",
        "this build of ems-vllm holds no CUDA kernels",
        "rebuild it where nvcc is installed",
        _device_without_kernels,
    ),
    Rule(
        "disable_hybrid_kv_cache_manager",
        "layers that share a budget unequally need block tables of their own",
        "drop the flag, or choose the allocator uniform",
        _one_group_of_layers_with_shares,
    ),
    Rule(
        "device",
        "this build of ems-vllm holds no CUDA kernels for this GPU",
        "rebuild it with the GPU's compute capability in TORCH_CUDA_ARCH_LIST",
        _gpu_without_kernels,
    ),
)

# Decided by the model's layers and their attention backend, once the model is loaded.
NO_FULL_ATTENTION = Refusal(
    "model",
    "it has no layer that can be compressed ({layers})",
    "serve a model that has one",
)
SPLIT_BLOCKS = Refusal(
    "block_size",
    "the attention backend splits it into blocks of {native}",
    "choose FLASH_ATTN or TRITON_ATTN with --attention-backend, or start with --block-size "
    "{native}",
)
UNKNOWN_BACKEND = Refusal(
    "attention_backend",
    "compression knows how to observe {known} only",
    "choose {choice} with --attention-backend",
)
MIXED_SCALES = Refusal(
    "model",
    "layers of one KV-cache group have different softmax scales ({scales})",
    "serve another model",
)
MIXED_QUERY_HEADS = Refusal(
    "model",
    "layers of one KV-cache group have different numbers of query heads ({heads}), and the queries "
    "of a group are recorded together",
    "choose a recipe that records none, as knorm",
)
HEAD_SCALES = Refusal(
    "model",
    "its checkpoint scales each kv_head of the fp8 cache on its own ({name})",
    "start with --kv-cache-dtype {dtype}, or serve a checkpoint with one scale per layer",
)
HEAD_SHARES = Refusal(
    "kv_compression_config.allocator",
    "it deals {reason}",
    "set its per_head to false, or choose a profile of this very model",
)
UNSPLIT_HEADS = Refusal(
    "kv_compression_config.allocator",
    "kv_heads cannot hold different numbers of entries here: {reason}",
    "choose the allocator uniform or profile without per_head, or TRITON_ATTN with "
    "--attention-backend where that is the reason",
)
LAYER_SHARES = Refusal(
    "kv_compression_config.allocator",
    "it deals to other layers than are compressed ({reason})",
    "choose the allocator uniform, or a profile of this very model",
)
MIXED_GROUP = Refusal(
    "model",
    "compressed layers need block tables of their own, but vLLM put {name} into one KV-cache "
    "group with layers of another kind",
    "drop --disable-hybrid-kv-cache-manager and VLLM_KV_CACHE_LAYOUT",
)
HARMONY_ROLES = Refusal(
    "kv_compression_config.protect",
    "the chats of gpt-oss are rendered without a template, so roles are not found",
    "drop it",
)
LAYER_REFUSALS = (
    NO_FULL_ATTENTION,
    LAYER_SHARES,
    HEAD_SHARES,
    UNSPLIT_HEADS,
    MIXED_GROUP,
    SPLIT_BLOCKS,
    UNKNOWN_BACKEND,
    MIXED_SCALES,
    MIXED_QUERY_HEADS,
    HEAD_SCALES,
)


def check_compatibility(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: one sentence with the setting, its value, the reason and the remedy.
    """
    # Whether the allocator knows a model of so many layers.
    config.plan_settings_of(vllm_config.model_config.get_total_num_hidden_layers())
    if config.protect and vllm_config.model_config.hf_config.model_type == "gpt_oss":
        raise HARMONY_ROLES.error(list(config.protect), config.recipe)
    for rule in RULES:
        if rule.only_with_queries and not config.scorer.reads_queries:
            continue
        value = rule.value(vllm_config)
        if value is not None:
            raise rule.error(value, config.recipe)
