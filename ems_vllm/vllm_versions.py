# SPDX-License-Identifier: Apache-2.0
"""The releases of vLLM that this package runs with, and what one of them has elsewhere.

vLLM is imported when something is asked for, not before: patches are described before it is loaded.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

SUPPORTED = ">=0.32.0,<0.34"
"""Versions that the package was written for."""

TESTED = ("0.32.0", "0.33.0")
"""Those of them whose code was read, and which the tests run."""


def by_version(sha256: str, of_0_33: str | None = None) -> dict[str, str]:
    """Hashes of a function's source by version.

    Args:
        sha256: In 0.32.0.
        of_0_33: In 0.33.0, where that changed the function.
    """
    return dict(zip(TESTED, (sha256, of_0_33 or sha256), strict=True))


def is_quantized_kv_cache(cache_dtype: str) -> bool:
    """vLLM's function of this name, which 0.33 keeps with the specs of KV caches."""
    try:
        from vllm.v1 import kv_cache_interface as module

        return module.is_quantized_kv_cache(cache_dtype)
    except AttributeError:
        from vllm.utils import torch_utils

        return torch_utils.is_quantized_kv_cache(cache_dtype)


@functools.cache
def bounds_cache_hits() -> bool:
    """Whether vLLM's scheduler passes on how long a prefix-cache hit may be, as from 0.33 on."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    parameters = inspect.signature(KVCacheManager.get_computed_blocks).parameters
    return "max_cache_hit_length" in parameters


def kv_cache_configs(
    vllm_config: VllmConfig, specs: list[dict[str, KVCacheSpec]], memory: list[int]
) -> list[KVCacheConfig]:
    """vLLM's get_kv_cache_configs, which from 0.33 on wants the groups beside the specs.

    Args:
        vllm_config: With the layout of the cache.
        specs: By layer, of each worker.
        memory: Bytes for the cache, of each worker.
    """
    found: list[KVCacheConfig]
    try:
        from vllm.v1.core import kv_cache_planning
    except ImportError:
        from vllm.v1.core import kv_cache_utils

        found = kv_cache_utils.get_kv_cache_configs(vllm_config, specs, memory)
        return found
    groups = kv_cache_planning.get_global_kv_cache_groups(vllm_config, specs)
    found = kv_cache_planning.get_kv_cache_configs(vllm_config, specs, memory, groups)
    return found
