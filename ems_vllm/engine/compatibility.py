# SPDX-License-Identifier: Apache-2.0
"""What compression cannot be combined with: one table, checked at start-up.

A combination that is not in this table works or has a test that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ems_vllm.config import KVCompressionConfig


@dataclass(frozen=True)
class Rule:
    """One combination that is refused.

    Attributes:
        key: The setting, as the operator knows it.
        value: Its value when it is in the way, else None.
        reason: Why it cannot work.
        remedy: What to do.
    """

    key: str
    value: Callable[[VllmConfig], Any]
    reason: str
    remedy: str


def _more_than_one(value: int) -> int | None:
    return value if value > 1 else None


def _mixed_full_graphs(config: VllmConfig) -> str | None:
    mode = config.compilation_config.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return None
    # FULL_AND_PIECEWISE and FULL_DECODE_ONLY run prompt chunks outside full graphs.
    return None if mode.separate_routine() else mode.name


RULES = (
    Rule(
        "model",
        lambda c: c.model_config.model if c.model_config.use_mla else None,
        "its latent attention (MLA) has no keys and values per head",
        "use a model with multi-head or grouped-query attention",
    ),
    Rule(
        "model",
        lambda c: c.model_config.model if c.model_config.is_encoder_decoder else None,
        "it is an encoder-decoder model",
        "use a decoder-only model",
    ),
    Rule(
        "runner",
        lambda c: c.model_config.runner_type if c.model_config.runner_type != "generate" else None,
        "only generation keeps a cache across steps",
        "serve a generative model",
    ),
    Rule(
        "speculative_config",
        lambda c: c.speculative_config.method if c.speculative_config else None,
        "rejected draft tokens would have to be taken back from compressed columns",
        "drop --speculative-config",
    ),
    Rule(
        "kv_transfer_config",
        lambda c: c.kv_transfer_config.kv_connector if c.kv_transfer_config else None,
        "connectors expect every column to hold its own tokens",
        "drop --kv-transfer-config",
    ),
    Rule(
        "decode_context_parallel_size",
        lambda c: _more_than_one(c.parallel_config.decode_context_parallel_size),
        "columns would be spread over ranks",
        "set it to 1",
    ),
    Rule(
        "prefill_context_parallel_size",
        lambda c: _more_than_one(c.parallel_config.prefill_context_parallel_size),
        "columns would be spread over ranks",
        "set it to 1",
    ),
    Rule(
        "enable_dbo",
        lambda c: c.parallel_config.enable_dbo or None,
        "microbatches build their metadata concurrently",
        "drop --enable-dbo",
    ),
    Rule(
        "kv_cache_dtype",
        lambda c: (
            c.cache_config.cache_dtype
            if c.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32")
            else None
        ),
        "quantised entries cannot be merged yet",
        "use --kv-cache-dtype auto",
    ),
    Rule(
        "kv_sharing_fast_prefill",
        lambda c: c.cache_config.kv_sharing_fast_prefill or None,
        "skipped layers record no queries",
        "drop --kv-sharing-fast-prefill",
    ),
    Rule(
        "hisparse_config",
        lambda c: c.attention_config.hisparse_config,
        "it moves blocks on its own",
        "drop it",
    ),
    Rule(
        "compilation_config.cudagraph_mode",
        _mixed_full_graphs,
        "prompt chunks inside a full CUDA graph could not be scored",
        "use FULL_AND_PIECEWISE (vLLM's default), FULL_DECODE_ONLY or PIECEWISE",
    ),
)


def check_compatibility(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: one sentence with the setting, its value, the reason and the remedy.
    """
    for rule in RULES:
        value = rule.value(vllm_config)
        if value is not None:
            raise ConfigError(
                f"{rule.key}={value!r} cannot be combined with kv_compression="
                f"{config.recipe!r}: {rule.reason}; {rule.remedy}, or set kv_compression to off."
            )
    _check_kernels(vllm_config)


def _check_kernels(vllm_config: VllmConfig) -> None:
    import ems_vllm

    device = vllm_config.device_config.device_type
    if device == "cuda" and not ems_vllm.build_info()["cuda_archs"]:
        raise ConfigError(
            "kv_compression cannot run on device='cuda': this build of ems-vllm holds no CUDA "
            "kernels; rebuild it where nvcc is installed, or set kv_compression to off."
        )
