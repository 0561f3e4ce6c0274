# SPDX-License-Identifier: Apache-2.0
"""One KV-cache group in the scheduler: frees compressed columns and keeps the prefix cache exact.

Rules for the prefix cache, with first = first live column after the prompt's compaction:
  * columns [0, first) hold exact attention KV: hashed and shared as always;
  * columns from first on are never hashed while they may still be compressed;
  * a hit ends at column first at the latest, so the columns that the compaction writes to are
    private and enough queries are left to score with.
A prompt too short to be compressed is shared as always; if its request grows long, the first
compaction waits for target columns beyond the prompt (part of the plan), and the generated
columns are hashed when the request ends uncompressed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from ems_vllm.engine.scheduler.group_spec import GroupSpec
    from ems_vllm.engine.scheduler.request import SchedulerRequest


class CompressedAttentionManager(FullAttentionManager):
    """Full-attention manager that gives compressed columns back.

    vLLM makes it from the group's spec; the scheduler's planner then lets it see its requests.

    Attributes:
        group_spec: That spec.
    """

    # vLLM 0.32 looks hits up in a classmethod that is not told which request asks, so the limit of
    # the request at hand is kept here while `limit_hits` is active. The scheduler is
    # single-threaded.
    _hit_limit: int | None = None

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.group_spec: GroupSpec = kv_cache_spec
        self._requests: Mapping[str, SchedulerRequest] = {}
        self._index = 0

    def follow(self, requests: Mapping[str, SchedulerRequest], index: int) -> None:
        """Learn about requests from the planner; before that none can be admitted.

        Args:
            requests: By id, from their first look-up in the prefix cache on.
            index: Of this group among the compressed ones.
        """
        self._requests = requests
        self._index = index

    def block_ids(self, request_id: str, first_column: int, num_tokens: int) -> list[int]:
        """Blocks of the columns from `first_column` on that hold the first `num_tokens` tokens."""
        stop = -(-num_tokens // self.block_size)
        return [block.block_id for block in self.req_to_blocks[request_id][first_column:stop]]

    def column_hashes(self, request: Request, first: int, end: int) -> Sequence[Hashable]:
        """Of columns [first, end), as the prefix cache knows them; fewer where they have none."""
        if not self.enable_caching:
            return ()
        per_column = self.block_size // self.block_pool.hash_block_size
        return request.block_hashes[(first + 1) * per_column - 1 : end * per_column : per_column]

    @classmethod
    @contextmanager
    def limit_hits(cls, limit: int | None) -> Iterator[None]:
        """Cap every look-up in the prefix cache to `limit` tokens within the context.

        For vLLM 0.32, whose scheduler has no such argument.
        """
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

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        limit = self._requests[request.request_id].max_shared_tokens
        if limit is not None:
            num_tokens = min(num_tokens, limit)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        # Indexed: a scheduler without a planner must not get as far as to allocate a block.
        plan = self._requests[request_id].ledgers[self._index].plan
        if apply_admission_cap:
            # Whether everything fits is asked before a request is admitted. One that was
            # preempted is compressed again as it is computed again, and never holds it all.
            num_tokens = min(num_tokens, plan.max_replay_columns(num_tokens) * self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        tracked = self._requests.get(request_id)
        if tracked is not None:
            ledger = tracked.ledgers[self._index]
            first = ledger.columns_to_free(processed_computed_tokens)
            self._remove_blocks_in_range(request_id, 0, first)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        tracked = self._requests.get(request_id)
        if tracked is not None and self.enable_caching and request_id in self.req_to_blocks:
            self._hash_untouched(tracked)
        return super().pop_blocks_for_free(request_id)

    def _hash_untouched(self, tracked: SchedulerRequest) -> None:
        """Share the generated columns of a request that was never compressed, as vLLM would."""
        if tracked.max_shared_tokens is None or tracked.compresses_prompt:
            return
        # A compaction that is still in flight writes into columns that would be hashed here; and
        # what came after one of another group was computed from what that one left.
        if not all(ledger.is_untouched for ledger in tracked.ledgers):
            return
        request = tracked.request
        num_processed = request.num_computed_tokens - request.num_in_flight_tokens
        super().cache_blocks(request, min(num_processed, request.num_tokens), replay_boundaries=())
