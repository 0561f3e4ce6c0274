# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM that tests call, and that lie elsewhere in one of the supported versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # until 0.32
    from vllm.v1.core import kv_cache_utils as planning

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

groups_of_uniform_page_size = planning._get_kv_cache_groups_uniform_page_size


def get_kv_cache_configs(
    vllm_config: VllmConfig, specs: list[dict[str, KVCacheSpec]], available_memory: list[int]
) -> list[KVCacheConfig]:
    """vLLM's, which from 0.33 on wants the groups beside the specs they come from."""
    more: tuple[Any, ...] = ()
    if hasattr(planning, "get_global_kv_cache_groups"):
        more = (planning.get_global_kv_cache_groups(vllm_config, specs),)
    return planning.get_kv_cache_configs(vllm_config, specs, available_memory, *more)
