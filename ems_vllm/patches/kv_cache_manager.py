# SPDX-License-Identifier: Apache-2.0
"""KVCacheManager: tell compressed groups which request asks the prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


def _wrap_get_computed_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: KVCacheManager, request: Request) -> Any:
        from ems_vllm.engine.kv_cache_manager import CompressedAttentionManager

        managers = [
            manager
            for manager in self.coordinator.single_type_managers
            if isinstance(manager, CompressedAttentionManager)
        ]
        limits = [manager.admit(request) for manager in managers]
        limit = min((limit for limit in limits if limit is not None), default=None)
        with CompressedAttentionManager.limit_hits(limit):
            return original(self, request)

    return get_computed_blocks


PATCHES = (
    Patch(
        target="vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        wrap=_wrap_get_computed_blocks,
        vllm=">=0.32.0,<0.33",
        source_sha256={
            "0.32.0": "77f434d88d573bfe05905a20df26ff51a86156214cf297ff9bbe5d5f05f32d07"
        },
        reason=(
            "A hit must end where the request's compaction begins to write, which depends on the "
            "request; SingleTypeKVCacheManager.find_longest_cache_hit is a classmethod that is "
            "given hashes only."
        ),
        remove_when="find_longest_cache_hit is an instance method that is given the request",
    ),
)
