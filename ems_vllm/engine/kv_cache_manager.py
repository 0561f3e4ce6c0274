# SPDX-License-Identifier: Apache-2.0
"""Scheduler side: frees compressed columns and keeps the prefix cache exact.

Rules for the prefix cache, with a = first live column after the prompt's compaction:
  * columns [0, a) hold exact attention KV: hashed and shared as always;
  * columns from a on are never hashed while they may still be compressed;
  * a hit ends at column a at the latest, so the columns that the compaction writes to are private
    and enough queries are left to score with.
A prompt too short to be compressed is shared as always; if its request grows long, the first
compaction waits for target columns beyond the prompt (part of the plan), and the generated
columns are hashed when the request ends uncompressed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from ems_vllm.config.request import RequestOptions
from ems_vllm.engine.compaction_ledger import CompactionLedger
from ems_vllm.patches import kv_cache_manager, scheduler

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from ems_vllm._C import CompressionPlan
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec


@dataclass
class _Tracked:
    """What the manager remembers of a request between admission and free."""

    request: Request
    plan: CompressionPlan
    ledger: CompactionLedger
    next_start: int = 0
    num_score_pages: int = 0


class CompressedAttentionManager(FullAttentionManager):
    """Full-attention manager that gives compressed columns back."""

    # vLLM looks hits up in a classmethod that is not told which request asks, so the limit of the
    # request at hand is kept here while `limit_hits` is active. The scheduler is single-threaded.
    _hit_limit: int | None = None

    def __init__(self, kv_cache_spec: CompressedAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        for patch in (*kv_cache_manager.PATCHES, *scheduler.PATCHES):
            patch.apply()
        self._settings = kv_cache_spec.settings
        self._free_score_pages = kv_cache_spec.num_prefix_score_pages
        self._tracked: dict[str, _Tracked] = {}
        # Kept through preemptions, for as long as the request exists.
        self._first_hits: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    # -- admission -----------------------------------------------------------------------------

    def admit(self, request: Request) -> int | None:
        """Take note of a request that is about to be scheduled for the first time, or again.

        Returns:
            The longest prefix-cache hit it may use, in tokens; None for no limit.
        """
        params = request.sampling_params
        options = RequestOptions.parse_admitted(params.extra_args if params else None)
        plan = self._settings.plan(request.num_prompt_tokens, self.block_size, options)
        self._tracked[request.request_id] = _Tracked(request, plan, CompactionLedger(plan))
        limit = plan.max_shared_tokens
        if limit is not None and self._free_score_pages is not None and plan.compresses_prompt:
            limit = min(limit, self._free_score_pages * self.block_size)
            # A preempted request finds its own prompt in the cache. Queries that scored at first
            # have to score again, or the preemption would change the answer.
            limit = min(limit, self._first_hits.get(request, limit))
        return limit

    @classmethod
    @contextmanager
    def limit_hits(cls, limit: int | None) -> Iterator[None]:
        """Cap every look-up in the prefix cache to `limit` tokens within the context."""
        cls._hit_limit = limit
        try:
            yield
        finally:
            cls._hit_limit = None

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        if cls._hit_limit is not None:
            max_length = min(max_length, cls._hit_limit)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        tracked = self._tracked[request_id]
        if self._free_score_pages is not None and tracked.plan.compresses_prompt:
            tracked.num_score_pages = len(new_computed_blocks)
            self._free_score_pages -= tracked.num_score_pages
            assert self._free_score_pages >= 0, "hit was not limited to the free score pages"

    # -- steps ---------------------------------------------------------------------------------

    def chunk_limit(self, request_id: str, start: int) -> int:
        """Most tokens that a step of this request may process.

        A request that was preempted computes its generated tokens again, many at a time. Ending
        every chunk where a compaction falls due makes them attend to what they attended to when
        they were generated, so a preemption changes no answer.

        Args:
            request_id: An admitted request.
            start: Tokens processed before the step.
        """
        next_compaction = self._tracked[request_id].plan.next_compaction(start)
        return sys.maxsize if next_compaction is None else next_compaction - start

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        # The one place that is told where a step starts; whether the step takes place is known
        # in allocate_new_blocks, which follows when there is room.
        self._tracked[request_id].next_start = total_computed_tokens
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(request_id, *args, **kwargs)
        tracked = self._tracked[request_id]
        tracked.ledger.step_scheduled(tracked.next_start)
        self._first_hits.setdefault(tracked.request, tracked.next_start)
        return blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        first = tracked.ledger.columns_to_free(processed_computed_tokens)
        self._remove_blocks_in_range(request_id, 0, first)
        if tracked.ledger.is_prompt_compacted:
            self._return_score_pages(tracked)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        limit = self._tracked[request.request_id].plan.max_shared_tokens
        if limit is not None:
            num_tokens = min(num_tokens, limit)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    # -- end -----------------------------------------------------------------------------------

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            self._return_score_pages(tracked)
            if self.enable_caching and request_id in self.req_to_blocks:
                self._hash_untouched(tracked)
        return super().pop_blocks_for_free(request_id)

    def _hash_untouched(self, tracked: _Tracked) -> None:
        """Share the generated columns of a request that was never compressed, as vLLM would."""
        if tracked.plan.max_shared_tokens is None or tracked.plan.compresses_prompt:
            return
        # A compaction that is still in flight writes into columns that would be hashed here.
        if not tracked.ledger.is_untouched:
            return
        request = tracked.request
        num_processed = request.num_computed_tokens - request.num_in_flight_tokens
        super().cache_blocks(request, min(num_processed, request.num_tokens), replay_boundaries=())

    def _return_score_pages(self, tracked: _Tracked) -> None:
        if self._free_score_pages is not None:
            self._free_score_pages += tracked.num_score_pages
            tracked.num_score_pages = 0
