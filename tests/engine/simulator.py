# SPDX-License-Identifier: Apache-2.0
"""vLLM's real Scheduler and KVCacheManager with a worker that computes with symbols.

Every slot of the pool holds a symbol that says what was written there: the token prefix it belongs
to and the compression state it was computed under, or which compaction of which request produced
it. Every slot of a score page says whose it is and which queries have scored it. Before a request's
next token is "computed", every slot that attention would read is compared with what must be there;
before a compaction, every score. A block that was handed out too early, written while shared, hit
although it was compressed, or compacted from a stale state shows up as a wrong symbol.

The worker acts in the most hostile order that vLLM allows: blocks are poisoned as soon as they are
allocated, and a step runs as late as possible, just before its output is processed.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
from engine.harness import LLAMA

from ems_vllm.config import load_config
from ems_vllm.engine.group_state import GroupStates
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.request_table import RequestTable, RunningRequest
from ems_vllm.engine.score_rows import score_rows

BLOCK_SIZE = 4
VOCABULARY = 50
POISON = ("poison",)
UNSCORED: tuple[Any, tuple[range, ...]] = (None, ())


def scheduler_for(
    compression: dict[str, Any] | None, num_blocks: int, async_scheduling: bool, **options: Any
) -> Any:
    """A scheduler as the engine core would build it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

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


class SymbolicWorker:
    """Writes and checks symbols; the request table, the states and the plan are the real ones.

    Args:
        spec: Of the only KV-cache group.
        num_blocks: Size of the pool.
        max_num_seqs: Most requests that run at a time.
    """

    def __init__(self, spec: Any, num_blocks: int, max_num_seqs: int) -> None:
        self.blocks = [[POISON] * BLOCK_SIZE for _ in range(num_blocks)]
        self.table = RequestTable(max_num_seqs)
        self.states = None
        if isinstance(spec, CompressedAttentionSpec):
            self.states = GroupStates(spec, num_blocks)
        pages = getattr(spec, "num_prefix_score_pages", None)
        # For every slot of a score page: whose it is, and the queries that scored it.
        self.scores: list[list[Any]] | None = None
        if pages is not None:
            self.scores = [[UNSCORED] * BLOCK_SIZE for _ in range(num_blocks + pages)]
        self.tokens: dict[str, list[int]] = {}
        self.first_hits: dict[str, int] = {}
        self.num_compactions = 0
        self.num_checked_slots = 0
        self.num_accepted_drafts = 0
        self._prefixes: dict[str, list[int]] = {}

    def execute(self, output: Any) -> dict[str, list[int]]:
        """Run one step; returns the sampled tokens by request."""
        update = self.table.update(output)
        for new in output.scheduled_new_reqs:
            self.tokens.setdefault(new.req_id, list(new.prompt_token_ids))
        for req_id, tokens in output.scheduled_cached_reqs.all_token_ids.items():
            # A resumed request: what it sampled in a step that was in flight may have been dropped.
            self.tokens[req_id] = list(tokens)
            self._prefixes.pop(req_id, None)
        for request in update.admitted:
            self.first_hits.setdefault(request.info.req_id, request.num_cached)
        if self.states is not None:
            for req_id in update.removed:
                self.states.remove(req_id)
            for request in update.admitted:
                self.states.admit(request)
        self._poison_new_blocks(output)
        for request in update.scheduled:
            self._compact(request)
        drafts = output.scheduled_spec_decode_tokens
        for request in update.scheduled:
            self._write(request, drafts.get(request.info.req_id, []))
        self._score(update.scheduled)
        return {
            request.info.req_id: self._sample(request, drafts.get(request.info.req_id, []))
            for request in update.scheduled
        }

    def draft(self, req_id: str, length: int) -> list[int]:
        """Drafts of a request's next tokens; the first ones are mostly right."""
        columns = self._columns(req_id)
        tokens = list(self.tokens[req_id])
        drafts = []
        for index in range(length):
            token = _next_token(_prefixes(tokens)[-1], columns)
            wrong = len(tokens) % (index + 2) == 0
            drafts.append((token + 1) % VOCABULARY if wrong else token)
            tokens.append(drafts[-1])
        return drafts

    def _columns(self, req_id: str) -> tuple[int, int]:
        if self.states is None:
            return (0, 0)
        state = self.states._states[req_id]
        return (state.first, state.tail)

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
        if self.states is None:
            return
        state = self.states[request]
        first, tail = state.plan.columns(request.num_computed)
        if first <= state.first:
            return
        self._check(request, request.num_computed, self._prefixes_of(request))
        if self.scores is not None:
            self._check_scores(request, tail)
        req_id, block_ids = request.info.req_id, request.block_ids[0]
        for column in range(first, tail):
            symbols = [
                ("compressed", req_id, first, tail, column, offset) for offset in range(BLOCK_SIZE)
            ]
            self.blocks[block_ids[column]] = symbols
            if self.scores is not None:
                carried = ("carried", req_id, first, tail)
                self.scores[block_ids[column]] = [carried] * BLOCK_SIZE
        self.states.compacted(state, first, tail)
        self.num_compactions += 1

    def _check_scores(self, request: RunningRequest, tail: int) -> None:
        """What is about to be compressed was scored by the right queries and nobody else's."""
        info, state = request.info, self.states[request]
        pages = state.pages(request.block_ids[0])
        for position in range(state.first * BLOCK_SIZE, tail * BLOCK_SIZE):
            found = self.scores[pages[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            if state.first and position < state.first * BLOCK_SIZE + state.num_carried:
                assert found == ("carried", info.req_id, state.first, state.tail), found
            elif state.plan.compresses_prompt and position < info.prompt_len and not state.first:
                # Of the queries that count, all that can see the entry.
                queries = range(max(self.first_hits[info.req_id], position), info.prompt_len)
                owner, spans = found
                assert owner == info.req_id, (info.req_id, position, found)
                seen = [query for span in spans for query in span if query >= position]
                assert seen == list(queries), (info, position, spans)

    def _score(self, requests: list[RunningRequest]) -> None:
        if self.states is None or self.scores is None:
            return
        starts = list(itertools.accumulate((r.num_scheduled for r in requests), initial=0))
        rows = score_rows(
            list(zip(requests, starts, strict=False)),
            self.states,
            0,
            BLOCK_SIZE,
            torch.device("cpu"),
        )
        if rows is None:
            return
        for row, start in enumerate(rows.query_starts.tolist()):
            # The request whose queries they are, as the batch knows it.
            index = max(i for i, first in enumerate(starts[:-1]) if first <= start)
            seq_len, num_queries = int(rows.seq_lens[row]), int(rows.query_lens[row])
            span = range(seq_len - num_queries, seq_len)
            assert start - starts[index] == span.start - requests[index].num_computed
            for position in range(seq_len):
                page = self.scores[int(rows.score_table[row, position // BLOCK_SIZE])]
                spans = (span,)
                if position < int(rows.accumulate_lens[row]):
                    owner, earlier = page[position % BLOCK_SIZE]
                    assert owner == requests[index].info.req_id, (owner, requests[index].info)
                    spans = (*earlier, span)
                page[position % BLOCK_SIZE] = (requests[index].info.req_id, spans)

    def _write(self, request: RunningRequest, drafts: list[int]) -> None:
        start, stop = request.num_computed, request.num_computed + request.num_scheduled
        columns = self._columns(request.info.req_id)
        prefixes = self._prefixes_of(request, drafts)
        for position in range(start, stop):
            block_id = request.block_ids[0][position // BLOCK_SIZE]
            self.blocks[block_id][position % BLOCK_SIZE] = _symbol(
                request, prefixes[position], columns
            )
        self._check(request, stop, prefixes)

    def _sample(self, request: RunningRequest, drafts: list[int]) -> list[int]:
        tokens = self.tokens[request.info.req_id]
        stop = request.num_computed + request.num_scheduled
        if stop < len(tokens):
            return []
        assert stop == len(tokens) + len(drafts)
        columns = self._columns(request.info.req_id)
        sampled: list[int] = []
        while True:
            sampled.append(_next_token(self._prefixes_of(request)[-1], columns))
            tokens.append(sampled[-1])
            if drafts[len(sampled) - 1 : len(sampled)] != sampled[-1:]:
                return sampled
            self.num_accepted_drafts += 1

    def _check(self, request: RunningRequest, num_tokens: int, prefixes: list[int]) -> None:
        """Compare every slot that attention reads with what must be there."""
        req_id = request.info.req_id
        first, tail = self._columns(req_id)
        plan = None if self.states is None else self.states[request].plan
        for position in range(first * BLOCK_SIZE, num_tokens):
            column, offset = divmod(position, BLOCK_SIZE)
            if column < tail:
                expected: Any = ("compressed", req_id, first, tail, column, offset)
            else:
                planned = (0, 0) if plan is None else plan.columns(position)
                expected = _symbol(request, prefixes[position], planned)
            found = self.blocks[request.block_ids[0][column]][offset]
            assert found == expected, (
                f"{req_id}: column {column} offset {offset} holds {found}, must hold {expected}"
            )
            self.num_checked_slots += 1

    def _prefixes_of(self, request: RunningRequest, drafts: Sequence[int] = ()) -> list[int]:
        """For every position of a request, a number that stands for the tokens up to it."""
        known = self._prefixes.setdefault(request.info.req_id, [])
        tokens = self.tokens[request.info.req_id]
        known += _prefixes(tokens[len(known) :], known[-1] if known else 0)
        return known + _prefixes(drafts, known[-1]) if drafts else known


def _prefixes(tokens: Sequence[int], start: int = 0) -> list[int]:
    return list(itertools.accumulate(tokens, lambda *pair: hash(pair), initial=start))[1:]


def _next_token(prefix: int, columns: tuple[int, int]) -> int:
    return hash((prefix, columns)) % VOCABULARY


def _symbol(request: RunningRequest, prefix: int, columns: tuple[int, int]) -> tuple[Any, ...]:
    """K/V of a token: its prefix, and the columns it attended to."""
    owner = request.info.req_id if columns[0] else None
    return ("kv", prefix, columns, owner)


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
        num_drafts: int = 0,
        **options: Any,
    ) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        if num_drafts:
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": num_drafts,
                "prompt_lookup_max": 2,
            }
        self.num_drafts = num_drafts
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
        if self.num_drafts:
            self._draft([req_id for req_id in req_ids if sampled[req_id]])

    def _draft(self, req_ids: list[str]) -> None:
        from vllm.v1.outputs import DraftTokenIds

        drafts = [self.worker.draft(req_id, self.num_drafts) for req_id in req_ids]
        self.scheduler.update_draft_token_ids(DraftTokenIds(req_ids, drafts))

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
