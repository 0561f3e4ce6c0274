# SPDX-License-Identifier: Apache-2.0
"""What a step must do to a request, from the settings and from vLLM's own output alone."""

from __future__ import annotations

from typing import Any

from engine.block_tables import BlockTables, Request

from ems_vllm.config import RequestOptions

# Tokens that no request ever has.
NEVER = 2**62


class Expected:
    """Follows the requests of the only group as a model runner does.

    Args:
        spec: Of the group, with the settings.
        obs_window: Last queries that are recorded before a compaction.
    """

    def __init__(self, spec: Any, obs_window: int) -> None:
        self.block_size = spec.block_size
        self.requests: dict[str, Request] = {}
        self._settings = spec.settings
        self._obs_window = obs_window
        self._tables = BlockTables()
        self._plans: dict[str, Any] = {}

    def update(self, output: Any) -> None:
        """Go on to the next step; `requests` are those of the step."""
        for new in output.scheduled_new_reqs:
            options = RequestOptions.parse(new.sampling_params.extra_args)
            plan = self._settings.plan(new.prompt_len, self.block_size, options)
            self._plans[new.req_id] = plan
        _, scheduled = self._tables.update(output)
        self.requests = {request.req_id: request for request in scheduled}

    def columns(self, num_tokens: int) -> int:
        return int(-(-num_tokens // self.block_size))

    def blocks(self, request: Request) -> list[int]:
        """What attention reads."""
        return request.block_ids[self.first(request) : self.columns(end(request))]

    def first(self, request: Request) -> int:
        """The first live column."""
        return self.compacted(request)[0]

    def first_before(self, request: Request) -> int:
        """The first live column in the step before, which ended at a compaction at the latest."""
        before = request.num_computed - 1
        return int(self._plans[request.req_id].columns(before)[0]) if before >= 0 else 0

    def compacted(self, request: Request) -> tuple[int, int]:
        """(first, tail) of what is compressed; (0, 0) where nothing is."""
        first, tail = self._plans[request.req_id].columns(request.num_computed)
        return int(first), int(tail)

    def is_compacted(self, request: Request) -> bool:
        """Whether this step begins with a compaction of the request."""
        return self.first(request) > self.first_before(request)

    def due(self, request: Request) -> int:
        """Tokens processed when the next compaction comes."""
        due = self._plans[request.req_id].next_compaction(request.num_computed)
        return NEVER if due is None else int(due)

    def read_by_compaction(self, request: Request) -> range:
        """Positions whose recorded queries the compaction at the start of this step uses."""
        computed_here = request.num_computed - request.num_cached
        return range(
            request.num_computed - min(self._obs_window, computed_here), request.num_computed
        )

    def recorded(self, request: Request) -> range:
        """Positions whose queries are recorded: the last ones before a compaction."""
        return range(max(request.num_computed, self.due(request) - self._obs_window), end(request))

    def scoring(self, request: Request) -> range:
        """Positions whose queries score: the last ones of a prompt that will be compressed."""
        plan = self._plans[request.req_id]
        if not plan.compresses_prompt:
            return range(0)
        first = max(request.num_computed, plan.first_scored_query(request.num_computed))
        return range(first, min(end(request), request.prompt_len))


def end(request: Request) -> int:
    """Tokens processed after the step."""
    return request.num_computed + request.num_scheduled
