# SPDX-License-Identifier: Apache-2.0
"""dtypes of the cache and of the queries, by vLLM's names and by torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's names of float8 e4m3 with one scale per layer for keys and one for values.
FLOAT8_CACHES = ("fp8", "fp8_e4m3")
# vLLM's names of caches that are not quantised.
PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")


def cache_dtype(config: VllmConfig) -> str | None:
    """torch's name of the dtype of the cache; None for a format that no operator knows."""
    name = config.cache_config.cache_dtype
    if name in FLOAT8_CACHES:
        return "float8_e4m3fn"
    if name == "auto":
        return dtype_name(config)
    return name if name in PLAIN_CACHES else None


def dtype_name(config: VllmConfig) -> str:
    """torch's name of the dtype of a model, which is that of its queries."""
    return str(config.model_config.dtype).removeprefix("torch.")


def unquantised_cache(config: VllmConfig) -> str:
    """Value of --kv-cache-dtype for a cache in the dtype of the queries.

    "auto" follows a checkpoint that asks for float8, and vLLM has no name for a cache of float32.
    """
    name = dtype_name(config)
    return name if name in ("bfloat16", "float16") else "bfloat16 --dtype bfloat16"
