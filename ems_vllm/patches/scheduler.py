# SPDX-License-Identifier: Apache-2.0
"""Scheduler: end a resumed prefill chunk where the request was compacted the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ems_vllm.patches.record import Patch

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def _wrap_reserve_prefill_lookahead(original: Callable[..., int]) -> Callable[..., int]:
    def _reserve_prefill_lookahead(
        self: Scheduler, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = original(self, request, num_computed_tokens, num_new_tokens)
        # One token never reaches past a compaction; that is every step of a plain decode.
        if num_new_tokens > 1:
            from ems_vllm.engine.kv_cache_manager import CompressedAttentionManager

            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                if isinstance(manager, CompressedAttentionManager):
                    limit = manager.chunk_limit(request.request_id, num_computed_tokens)
                    num_new_tokens = min(num_new_tokens, limit)
        return num_new_tokens

    return _reserve_prefill_lookahead


PATCHES = (
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
        wrap=_wrap_reserve_prefill_lookahead,
        vllm=">=0.32.0,<0.33",
        source_sha256={
            "0.32.0": "c214e49d7610a63a4b06caa23f725b1f986f449364aa1fca1b44e5b152922f8d"
        },
        reason=(
            "After a preemption, generated tokens are computed again in chunks. Each has to attend "
            "to what it attended to at first, so a chunk must not run across a compaction; "
            "KV-cache managers have no say in the length of a chunk."
        ),
        remove_when="KV-cache managers can bound the number of tokens scheduled for a request",
    ),
)
