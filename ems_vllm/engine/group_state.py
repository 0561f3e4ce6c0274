# SPDX-License-Identifier: Apache-2.0
"""How far each request of a group has been compressed, and where its scores are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ems_vllm.engine.score_pages import PrivatePages

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
    from ems_vllm.engine.request_table import RunningRequest


@dataclass
class RequestState:
    """Compression state of one request in one group.

    Attributes:
        plan: The same function that the scheduler computes.
        first, tail: Columns after the last compaction; 0, 0 before the first.
        score_pages: Private score pages of the columns that came from the prefix cache.
        num_carried: Leading live entries whose accumulated score was carried over.
    """

    plan: CompressionPlan
    first: int = 0
    tail: int = 0
    score_pages: list[int] = field(default_factory=list)
    num_carried: int = 0

    def pages(self, block_ids: list[int]) -> list[int]:
        """Score page of every column, given the block of every column."""
        return self.score_pages + block_ids[len(self.score_pages) :]


class GroupStates:
    """States of the running requests of one group.

    Args:
        spec: Spec of the group.
        num_blocks: Blocks of the cache.
    """

    def __init__(self, spec: CompressedAttentionSpec, num_blocks: int) -> None:
        self._spec = spec
        self._states: dict[str, RequestState] = {}
        self._pages: PrivatePages | None = None
        if spec.num_prefix_score_pages is not None:
            self._pages = PrivatePages(num_blocks, spec.num_prefix_score_pages)

    def __getitem__(self, request: RunningRequest) -> RequestState:
        return self._states[request.info.req_id]

    def admit(self, request: RunningRequest) -> None:
        """Start to follow a request that was just given blocks."""
        info = request.info
        plan = self._spec.settings.plan(info.prompt_len, self._spec.block_size, info.options)
        state = self._states[info.req_id] = RequestState(plan)
        if self._pages is not None and plan.compresses_prompt:
            state.score_pages = self._pages.take(request.num_cached // self._spec.block_size)

    def remove(self, req_id: str) -> None:
        """Forget a request that gave its blocks back."""
        self._release_pages(self._states.pop(req_id))

    def compacted(self, state: RequestState, first: int, tail: int) -> None:
        """Take note of a compaction into columns [first, tail)."""
        state.first, state.tail = first, tail
        if self._pages is not None:
            state.num_carried = (tail - first) * self._spec.block_size
        self._release_pages(state)

    def _release_pages(self, state: RequestState) -> None:
        if self._pages is not None:
            self._pages.give_back(state.score_pages)
