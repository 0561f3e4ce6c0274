# SPDX-License-Identifier: Apache-2.0
"""Block tables as a model runner keeps them, from vLLM's scheduler outputs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Request:
    """A request that holds blocks.

    Attributes:
        tables: By KV-cache group: block of every column ever allocated; those that the scheduler
            has freed keep their stale id.
        num_cached: Tokens that came from the prefix cache at the latest admission.
        num_computed: Tokens processed before the current step.
        num_scheduled: Tokens of the current step; 0 when it is not part of it.
    """

    req_id: str
    prompt_len: int
    tables: list[list[int]]
    num_cached: int
    num_computed: int
    num_scheduled: int = 0

    @property
    def block_ids(self) -> list[int]:
        """The table of the only group."""
        (table,) = self.tables
        return table

    @property
    def end(self) -> int:
        """Tokens processed after the current step."""
        return self.num_computed + self.num_scheduled


class BlockTables:
    """Running requests by id."""

    def __init__(self) -> None:
        self._prompt_lens: dict[str, int] = {}
        self._running: dict[str, Request] = {}

    def update(self, output: Any) -> tuple[list[Request], list[Request]]:
        """Follow a scheduler output.

        Returns:
            Requests that begin, or begin again after a preemption, and all of the step.
        """
        cached = output.scheduled_cached_reqs
        for req_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self._running.pop(req_id, None)
        admitted = []
        for new in output.scheduled_new_reqs:
            # Model runner V2 is told of a resumed request as of a new one.
            self._prompt_lens.setdefault(new.req_id, new.prompt_len)
            admitted.append(self._admit(new.req_id, new.block_ids, new.num_computed_tokens))
        for req_id, num_computed, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if req_id in cached.resumed_req_ids:
                admitted.append(self._admit(req_id, block_ids, num_computed))
                continue
            request = self._running[req_id]
            request.num_computed = num_computed
            if block_ids is not None:
                for table, new_ids in zip(request.tables, block_ids, strict=True):
                    table.extend(new_ids)
        scheduled = []
        for req_id, num_scheduled in output.num_scheduled_tokens.items():
            self._running[req_id].num_scheduled = num_scheduled
            scheduled.append(self._running[req_id])
        return admitted, scheduled

    def _admit(self, req_id: str, block_ids: tuple[list[int], ...], num_computed: int) -> Request:
        request = Request(
            req_id,
            self._prompt_lens[req_id],
            list(map(list, block_ids)),
            num_computed,
            num_computed,
        )
        self._running[req_id] = request
        return request
