# SPDX-License-Identifier: Apache-2.0
"""Worker side: what is known of every running request, from scheduler outputs alone.

Both model runners are driven by the same SchedulerOutput, so nothing here depends on which one
runs, and nothing has to be read back from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.config.request import RequestOptions

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


@dataclass(frozen=True)
class RequestInfo:
    """What does not change while a request lives, preemptions included.

    Attributes:
        req_id: vLLM's.
        prompt_len: Tokens of the prompt.
        options: What the request asked for.
        num_first_hit: Tokens that came from the prefix cache when it was first admitted. The
            queries after them are the ones that score, also when it is computed again.
    """

    req_id: str
    prompt_len: int
    options: RequestOptions
    num_first_hit: int


@dataclass
class RunningRequest:
    """A request that holds blocks.

    Attributes:
        block_ids: Per KV-cache group, the block of every column ever allocated. Columns that the
            scheduler has freed keep their stale id and must not be read.
        num_cached: Tokens that came from the prefix cache at the latest admission.
        num_computed: Tokens processed before the current step.
        num_scheduled: Tokens of the current step; 0 when it is not part of it.
        ring_row: Row of the query ring.
    """

    info: RequestInfo
    block_ids: tuple[list[int], ...]
    num_cached: int
    num_computed: int
    ring_row: int
    num_scheduled: int = 0


@dataclass(frozen=True)
class TableUpdate:
    """What a scheduler output changed.

    Attributes:
        removed: Requests that gave their blocks back, before anything was admitted.
        admitted: Requests that start, or start again after a preemption.
        scheduled: Requests of this step.
    """

    removed: list[str]
    admitted: list[RunningRequest]
    scheduled: list[RunningRequest]


class RequestTable:
    """Running requests by id, and the free rows of the query ring.

    Args:
        max_num_seqs: Most requests that run at a time.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._infos: dict[str, RequestInfo] = {}
        self._running: dict[str, RunningRequest] = {}
        self._free_ring_rows = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._running)

    def update(self, output: SchedulerOutput) -> TableUpdate:
        """Follow a scheduler output, at the start of its step."""
        cached = output.scheduled_cached_reqs
        removed = []
        for req_id in output.finished_req_ids:
            self._infos.pop(req_id, None)
            removed += self._remove(req_id)
        for req_id in output.preempted_req_ids or ():
            removed += self._remove(req_id)
        for req_id in cached.resumed_req_ids:
            removed += self._remove(req_id)
        for new in output.scheduled_new_reqs:
            removed += self._remove(new.req_id)

        admitted = []
        for new in output.scheduled_new_reqs:
            info = self._infos.get(new.req_id)
            # Model runner V2 is told of a resumed request as of a new one.
            if info is None:
                info = self._infos[new.req_id] = _info(new)
            admitted.append(self._admit(info, new.block_ids, new.num_computed_tokens))
        for req_id, num_computed, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if req_id in cached.resumed_req_ids:
                assert block_ids is not None
                admitted.append(self._admit(self._infos[req_id], block_ids, num_computed))
                continue
            request = self._running[req_id]
            request.num_computed = num_computed
            for held, new_ids in zip(request.block_ids, block_ids or (), strict=False):
                held.extend(new_ids)

        scheduled = []
        for req_id, num_scheduled in output.num_scheduled_tokens.items():
            request = self._running[req_id]
            request.num_scheduled = num_scheduled
            scheduled.append(request)
        return TableUpdate(removed, admitted, scheduled)

    def _admit(
        self, info: RequestInfo, block_ids: tuple[list[int], ...], num_computed: int
    ) -> RunningRequest:
        request = RunningRequest(
            info=info,
            block_ids=tuple(list(ids) for ids in block_ids),
            num_cached=num_computed,
            num_computed=num_computed,
            ring_row=self._free_ring_rows.pop(),
        )
        self._running[info.req_id] = request
        return request

    def _remove(self, req_id: str) -> list[str]:
        request = self._running.pop(req_id, None)
        if request is None:
            return []
        self._free_ring_rows.append(request.ring_row)
        return [req_id]


def _info(new: NewRequestData) -> RequestInfo:
    params = new.sampling_params
    options = RequestOptions.parse_admitted(params.extra_args if params else None)
    return RequestInfo(new.req_id, new.prompt_len, options, new.num_computed_tokens)
