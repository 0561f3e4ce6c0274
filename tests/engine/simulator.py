# SPDX-License-Identifier: Apache-2.0
"""vLLM's real Scheduler and KVCacheManager with a worker that computes with symbols.

Every slot of the pool holds a symbol that says what was written there: the token prefix it belongs
to and the compression state it was computed under, or which compaction of which request produced
it. Before a request's next token is "computed", every slot that attention would read is compared
with what must be there. A block that was handed out too early, written while shared, hit although
it was compressed, or compacted from a stale state shows up as a wrong symbol.

The worker acts in the most hostile order that vLLM allows: blocks are poisoned as soon as they are
allocated, and a step runs as late as possible, just before its output is processed.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from engine.harness import LLAMA

from ems_vllm.config import load_config
from ems_vllm.engine.request_table import RequestTable, RunningRequest
from ems_vllm.engine.score_pages import PrivatePages

BLOCK_SIZE = 4
VOCABULARY = 50
POISON = ("poison",)


def scheduler_for(
    compression: dict[str, Any] | None, num_blocks: int, async_scheduling: bool, **options: Any
) -> Any:
    """A scheduler as the engine core would build it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

    additional = {} if compression is None else {"kv_compression": compression}
    vllm_config = EngineArgs(
        model=LLAMA,
        max_model_len=(num_blocks - 1) * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        async_scheduling=async_scheduling,
        additional_config=additional,
        **{"max_num_seqs": 8, "max_num_batched_tokens": 32, **options},
    ).create_engine_config()
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    config = load_config(compression)
    if config is not None:
        pages = (config.prefix_score_tokens or 0) // BLOCK_SIZE
        spec = CompressedAttentionSpec.compress(
            spec, config.plan_settings, pages if config.scorer.uses_global else None
        )
    kv_cache_config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        hash_block_size=BLOCK_SIZE,
    )
    return vllm_config.scheduler_config.get_scheduler_cls()(
        vllm_config=vllm_config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


@dataclass
class _Compressed:
    """Worker-side state of one request, as CompressedGroup keeps it."""

    plan: Any
    first: int = 0
    tail: int = 0
    pages: list[int] = field(default_factory=list)


class SymbolicWorker:
    """Writes and checks symbols; uses the real RequestTable and plan."""

    def __init__(self, spec: Any, num_blocks: int, max_num_seqs: int) -> None:
        self.spec = spec
        self.blocks = [[POISON] * BLOCK_SIZE for _ in range(num_blocks)]
        self.table = RequestTable(max_num_seqs)
        self.states: dict[str, _Compressed] = {}
        self.tokens: dict[str, list[int]] = {}
        self.num_compactions = 0
        self.num_checked_slots = 0
        pages = getattr(spec, "num_prefix_score_pages", None)
        self.pages = None if pages is None else PrivatePages(num_blocks, pages)

    def execute(self, output: Any) -> dict[str, list[int]]:
        """Run one step; returns the sampled tokens by request."""
        update = self.table.update(output)
        for req_id in update.removed:
            state = self.states.pop(req_id)
            if self.pages is not None:
                self.pages.give_back(state.pages)
        for new in output.scheduled_new_reqs:
            self.tokens.setdefault(new.req_id, list(new.prompt_token_ids))
        for request in update.admitted:
            self._admit(request)
        self._poison_new_blocks(output)
        for request in update.scheduled:
            self._compact(request)
        for request in update.scheduled:
            self._write(request)
        return {request.info.req_id: self._sample(request) for request in update.scheduled}

    def _admit(self, request: RunningRequest) -> None:
        settings = getattr(self.spec, "settings", None)
        plan = None
        if settings is not None:
            info = request.info
            plan = settings.plan(info.prompt_len, BLOCK_SIZE, info.options)
        state = self.states[request.info.req_id] = _Compressed(plan)
        if self.pages is not None and plan.compresses_prompt:
            state.pages = self.pages.take(request.num_cached // BLOCK_SIZE)

    def _poison_new_blocks(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self._poison(new.block_ids[0][new.num_computed_tokens // BLOCK_SIZE :])
        cached = output.scheduled_cached_reqs
        for req_id, computed, ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if ids is not None:
                resumed = req_id in cached.resumed_req_ids
                self._poison(ids[0][computed // BLOCK_SIZE if resumed else 0 :])

    def _poison(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id] = [POISON] * BLOCK_SIZE

    def _compact(self, request: RunningRequest) -> None:
        state = self.states[request.info.req_id]
        if state.plan is None:
            return
        first, tail = state.plan.columns(request.num_computed)
        if first <= state.first:
            return
        self._check(request, state, request.num_computed)
        for column in range(first, tail):
            self.blocks[request.block_ids[0][column]] = [
                self._compressed_symbol(request, first, tail, column, offset)
                for offset in range(BLOCK_SIZE)
            ]
        state.first, state.tail = first, tail
        self.num_compactions += 1
        if self.pages is not None:
            self.pages.give_back(state.pages)

    def _write(self, request: RunningRequest) -> None:
        start, stop = request.num_computed, request.num_computed + request.num_scheduled
        state = self.states[request.info.req_id]
        columns = (state.first, state.tail)
        for position in range(start, stop):
            block_id = request.block_ids[0][position // BLOCK_SIZE]
            self.blocks[block_id][position % BLOCK_SIZE] = self._symbol(request, position, columns)
        self._check(request, state, stop)

    def _sample(self, request: RunningRequest) -> list[int]:
        tokens = self.tokens[request.info.req_id]
        stop = request.num_computed + request.num_scheduled
        if stop < len(tokens):
            return []
        assert stop == len(tokens)
        state = self.states[request.info.req_id]
        token = hash((tuple(tokens), state.first, state.tail)) % VOCABULARY
        tokens.append(token)
        return [token]

    def _check(self, request: RunningRequest, state: _Compressed, num_tokens: int) -> None:
        """Compare every slot that attention reads with what must be there."""
        for position in range(state.first * BLOCK_SIZE, num_tokens):
            column, offset = divmod(position, BLOCK_SIZE)
            if column < state.tail:
                expected = self._compressed_symbol(request, state.first, state.tail, column, offset)
            else:
                planned = state.plan.columns(position) if state.plan is not None else (0, 0)
                expected = self._symbol(request, position, planned)
            found = self.blocks[request.block_ids[0][column]][offset]
            assert found == expected, (
                f"{request.info.req_id}: column {column} offset {offset} holds {found}, "
                f"must hold {expected}"
            )
            self.num_checked_slots += 1

    def _symbol(
        self, request: RunningRequest, position: int, columns: tuple[int, int]
    ) -> tuple[Any, ...]:
        """K/V of a token: its prefix, and the columns it attended to."""
        tokens = self.tokens[request.info.req_id]
        owner = request.info.req_id if columns[0] else None
        return ("kv", hash(tuple(tokens[: position + 1])), columns, owner)

    def _compressed_symbol(
        self, request: RunningRequest, first: int, tail: int, column: int, offset: int
    ) -> tuple[Any, ...]:
        return ("compressed", request.info.req_id, first, tail, column, offset)


class Simulator:
    """Requests come and go; `step` schedules, and processes outputs with the engine's lag."""

    num_events = 0
    """Arrivals, steps, aborts and preemptions of all simulators so far."""

    def __init__(
        self,
        compression: dict[str, Any] | None,
        *,
        num_blocks: int = 40,
        async_scheduling: bool = False,
        **options: Any,
    ) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        self.scheduler = scheduler_for(compression, num_blocks, async_scheduling, **options)
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = SymbolicWorker(
            self.manager.kv_cache_spec, num_blocks, self.scheduler.max_num_running_reqs
        )
        self.lag = 1 if async_scheduling else 0
        self.in_flight: deque[Any] = deque()
        self.answers: dict[str, list[int]] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self._ids = itertools.count()
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self._score_pages = getattr(self.manager.kv_cache_spec, "num_prefix_score_pages", None)

    def add(
        self, prompt: list[int], max_tokens: int, extra_args: dict[str, Any] | None = None
    ) -> str:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        Simulator.num_events += 1
        req_id = f"r{next(self._ids)}"
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=0, extra_args=extra_args
        )
        params.update_from_generation_config({}, eos_token_id=10**6)
        self.scheduler.add_request(
            Request(req_id, list(prompt), params, None, block_hasher=self._hasher)
        )
        return req_id

    @property
    def unfinished(self) -> list[str]:
        return list(self.scheduler.requests)

    def step(self) -> None:
        """Schedule one step; run and process the oldest one that is due."""
        Simulator.num_events += 1
        output = self.scheduler.schedule()
        self.num_preemptions += len(output.preempted_req_ids or ())
        self.num_steps += 1
        self.in_flight.append(output)
        self.check()
        while len(self.in_flight) > self.lag:
            self._process()
        self.check()

    def _process(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.in_flight.popleft()
        sampled = self.worker.execute(output)
        req_ids = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
            sampled_token_ids=[sampled[req_id] for req_id in req_ids],
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            for item in outputs.outputs:
                self.answers.setdefault(item.request_id, []).extend(item.new_token_ids)

    def abort(self, req_id: str) -> None:
        from vllm.v1.request import RequestStatus

        Simulator.num_events += 1
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)
        self.answers.pop(req_id, None)
        self.check()

    def preempt(self, index: int) -> None:
        """Preempt a running request, as a full pool would."""
        if not self.scheduler.running:
            return
        Simulator.num_events += 1
        request = self.scheduler.running.pop(index % len(self.scheduler.running))
        self.scheduler._preempt_request(request, 0.0)
        self.num_preemptions += 1
        self.check()

    def drain(self, limit: int = 5000) -> None:
        """Run until everything has finished and every output was processed."""
        while self.unfinished or self.in_flight:
            limit -= 1
            assert limit > 0, "the scheduler makes no progress"
            self.step()
            if not self.unfinished:
                while self.in_flight:
                    self._process()
        self.check()

    def check(self) -> None:
        """Block accounting that must hold at any time."""
        references = Counter(
            block.block_id
            for blocks in self.manager.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        )
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == references[block.block_id], block
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(references)
        if self._score_pages is not None:
            taken = sum(item.num_score_pages for item in self.manager._tracked.values())
            assert self.manager._free_score_pages == self._score_pages - taken
