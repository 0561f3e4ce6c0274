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
from unittest import mock

import numpy as np
import torch
from engine.block_tables import BlockTables, Request
from engine.harness import LLAMA

from ems_vllm.config import RequestOptions, load_config
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.observation import ObservationSettings
from ems_vllm.engine.orders import attached
from ems_vllm.engine.residents import Residents
from ems_vllm.engine.runtime import Batch, ring_slots

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

    # An engine wants pages for the longest prompt; here, for the longest of the test.
    settings = {k: v for k, v in (compression or {}).items() if k != "prefix_score_tokens"}
    additional = {} if compression is None else {"kv_compression": settings}
    arguments = EngineArgs(
        model=LLAMA,
        max_model_len=(num_blocks - 1) * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        async_scheduling=async_scheduling,
        additional_config=additional,
        **{"max_num_seqs": 8, "max_num_batched_tokens": 32, **options},
    )
    # Drafts are made up here; no kernel is needed.
    with mock.patch("ems_vllm.platform.cpu._require_drafting"):
        vllm_config = arguments.create_engine_config()
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    config = load_config(compression)
    if config is not None:
        observation = ObservationSettings(
            obs_window=config.obs_window if config.scorer.uses_window else 0,
            score_tokens=config.prefix_score_tokens if config.scorer.uses_global else None,
            ring_rows=config.query_ring_rows,
        )
        spec = CompressedAttentionSpec.compress(spec, config.plan_settings, observation)
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
    """Writes and checks symbols; obeys real orders, and keeps the real record of what it holds.

    Block tables are followed as a model runner follows them, from vLLM's own output, and compared
    with what the orders name.

    Args:
        spec: Of the only KV-cache group.
        num_blocks: Size of the pool.
        max_num_seqs: Most requests that run at a time.
        num_drafts: Drafted tokens of a decoding request.
    """

    def __init__(self, spec: Any, num_blocks: int, max_num_seqs: int, num_drafts: int = 0) -> None:
        self.blocks = [[POISON] * BLOCK_SIZE for _ in range(num_blocks)]
        self.table = BlockTables()
        self.num_drafts = num_drafts
        self.spec = spec if isinstance(spec, CompressedAttentionSpec) else None
        self.residents = Residents()
        # For every slot of a score page: whose it is, and the queries that scored it.
        self.scores: list[list[Any]] | None = None
        self.ring: list[list[Any]] = []
        if self.spec is not None:
            if self.spec.observation.score_tokens is not None:
                pages = num_blocks + self.spec.num_score_pages
                self.scores = [[UNSCORED] * BLOCK_SIZE for _ in range(pages)]
            rows = self.spec.num_ring_rows(num_blocks, max_num_seqs)
            self.ring = [[None] * self.spec.observation.obs_window for _ in range(rows)]
        self.tokens: dict[str, list[int]] = {}
        self.first_hits: dict[str, int] = {}
        self.plans: dict[str, Any] = {}
        self.num_compactions = 0
        self.num_checked_slots = 0
        self.num_accepted_drafts = 0
        self._compacted: dict[str, tuple[int, int]] = {}
        self._prefixes: dict[str, list[int]] = {}

    def execute(self, output: Any) -> dict[str, list[int]]:
        """Run one step; returns the sampled tokens by request."""
        admitted, scheduled = self.table.update(output)
        for new in output.scheduled_new_reqs:
            self.tokens.setdefault(new.req_id, list(new.prompt_token_ids))
            self._plan(new)
        for req_id, tokens in output.scheduled_cached_reqs.all_token_ids.items():
            # A resumed request: what it sampled in a step that was in flight may have been dropped.
            self.tokens[req_id] = list(tokens)
            self._prefixes.pop(req_id, None)
        for request in admitted:
            self.first_hits.setdefault(request.req_id, request.num_cached)
            self._compacted.pop(request.req_id, None)
        self._poison_new_blocks(output)
        orders = attached(output)
        if self.spec is not None:
            self._obey(orders, output, {request.req_id: request for request in scheduled})
        drafts = output.scheduled_spec_decode_tokens
        for request in scheduled:
            self._write(request, drafts.get(request.req_id, []))
        if self.spec is not None:
            self._observe(orders, scheduled)
        return {
            request.req_id: self._sample(request, drafts.get(request.req_id, []))
            for request in scheduled
        }

    def _plan(self, new: Any) -> None:
        """What must hold, from the settings; nothing of it is asked when orders are obeyed."""
        if self.spec is not None and new.req_id not in self.plans:
            options = RequestOptions.parse(new.sampling_params.extra_args)
            self.plans[new.req_id] = self.spec.settings.plan(new.prompt_len, BLOCK_SIZE, options)

    def _obey(self, orders: Any, output: Any, requests: dict[str, Request]) -> None:
        self.residents.begin_step(orders)
        starts = [request.num_computed for request in requests.values()]
        assert orders.starts == starts, (orders.starts, starts)
        self.residents.compact(orders.compactions)
        for order in orders.compactions:
            self._compact(order, requests[order.req_id])
        self.residents.check_first_columns(output.num_scheduled_tokens, orders)
        for chunk in orders.scored:
            self.residents.scored(chunk)
        for queries in orders.recorded:
            request = requests[queries.req_id]
            self.residents.recorded(queries, request.num_computed + request.num_scheduled)

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
        return self._compacted.get(req_id, (0, 0))

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

    def _compact(self, order: Any, request: Request) -> None:
        req_id, tail = order.req_id, order.tail
        columns = -(-order.num_computed // BLOCK_SIZE)
        assert order.block_ids == request.block_ids[order.first_before : columns], order
        self._check(request, order.num_computed, self._prefixes_of(request))
        self._check_ring(order)
        pages = [*order.score_pages, *order.block_ids[len(order.score_pages) :]]
        if self.scores is not None:
            self._check_scores(order, request, pages)
        for column in range(order.first, tail):
            symbols = [
                ("compressed", req_id, order.first, tail, column, offset)
                for offset in range(BLOCK_SIZE)
            ]
            self.blocks[request.block_ids[column]] = symbols
            if self.scores is not None:
                carried = ("carried", req_id, order.first, tail)
                self.scores[request.block_ids[column]] = [carried] * BLOCK_SIZE
        self._compacted[req_id] = (order.first, tail)
        self.num_compactions += 1

    def _check_ring(self, order: Any) -> None:
        """The recorded queries are the request's newest."""
        if order.ring_row < 0:
            assert not self.spec.observation.obs_window, order
            return
        row = self.ring[order.ring_row]
        for position in range(order.num_computed - order.num_queries, order.num_computed):
            found = row[position % len(row)]
            assert found == (order.req_id, position), (order, position, found)
        assert order.num_queries == min(len(row), order.num_computed)

    def _check_scores(self, order: Any, request: Request, pages: list[int]) -> None:
        """What is about to be compressed was scored by the right queries and nobody else's."""
        before, plan = self._columns(order.req_id), self.plans[order.req_id]
        for entry in range((order.tail - order.first_before) * BLOCK_SIZE):
            found = self.scores[pages[entry // BLOCK_SIZE]][entry % BLOCK_SIZE]
            position = order.first_before * BLOCK_SIZE + entry
            if order.first_before and position < before[1] * BLOCK_SIZE:
                assert entry < order.num_scored, order
                assert found == ("carried", order.req_id, *before), found
            elif plan.compresses_prompt and position < request.prompt_len and not before[0]:
                assert entry < order.num_scored, order
                # Of the queries that count, all that can see the entry.
                first = max(self.first_hits[order.req_id], plan.first_scored_query)
                owner, spans = found
                assert owner == order.req_id, (order.req_id, position, found)
                seen = [query for span in spans for query in span if query >= position]
                expected = range(max(first, position), request.prompt_len)
                assert seen == list(expected), (order, position, spans)
            else:
                assert entry >= order.num_scored, order

    def _observe(self, orders: Any, requests: list[Request]) -> None:
        """Queries that are recorded, and those that score."""
        starts = list(itertools.accumulate((r.num_scheduled for r in requests), initial=0))
        batch = Batch(
            orders=orders,
            row={request.req_id: row for row, request in enumerate(requests)},
            order=np.arange(len(requests)),
            query_starts=np.array(starts[:-1]),
            num_scheduled=np.array([request.num_scheduled for request in requests]),
            starts=np.array([request.num_computed for request in requests]),
        )
        window = self.spec.observation.obs_window
        for token, slot in enumerate(ring_slots(batch, starts[-1], window or 1).tolist()):
            if slot >= 0:
                index = max(i for i, first in enumerate(starts[:-1]) if first <= token)
                position = requests[index].num_computed + token - starts[index]
                self.ring[slot // window][slot % window] = (requests[index].req_id, position)
        for chunk in orders.scored:
            self._score(chunk, requests[batch.row[chunk.req_id]])

    def _score(self, chunk: Any, request: Request) -> None:
        columns = -(-chunk.seq_len // BLOCK_SIZE)
        assert chunk.block_ids == request.block_ids[:columns], chunk
        assert request.num_computed <= chunk.first_query < chunk.seq_len
        assert chunk.seq_len <= request.num_computed + request.num_scheduled
        # A batch of such chunks alone would replay the CUDA graph of decoding, which scores none.
        assert request.num_scheduled > self.num_drafts + 1, chunk
        pages = [*chunk.score_pages, *chunk.block_ids[len(chunk.score_pages) :]]
        span = range(chunk.first_query, chunk.seq_len)
        for position in range(chunk.seq_len):
            page = self.scores[pages[position // BLOCK_SIZE]]
            spans: tuple[range, ...] = (span,)
            if position < chunk.num_accumulated:
                owner, earlier = page[position % BLOCK_SIZE]
                assert owner == chunk.req_id, (owner, chunk)
                spans = (*earlier, span)
            page[position % BLOCK_SIZE] = (chunk.req_id, spans)

    def _write(self, request: Request, drafts: list[int]) -> None:
        start, stop = request.num_computed, request.num_computed + request.num_scheduled
        columns = self._columns(request.req_id)
        prefixes = self._prefixes_of(request, drafts)
        for position in range(start, stop):
            block_id = request.block_ids[position // BLOCK_SIZE]
            self.blocks[block_id][position % BLOCK_SIZE] = _symbol(
                request, prefixes[position], columns
            )
        self._check(request, stop, prefixes)

    def _sample(self, request: Request, drafts: list[int]) -> list[int]:
        tokens = self.tokens[request.req_id]
        stop = request.num_computed + request.num_scheduled
        if stop < len(tokens):
            return []
        assert stop == len(tokens) + len(drafts)
        columns = self._columns(request.req_id)
        sampled: list[int] = []
        while True:
            sampled.append(_next_token(self._prefixes_of(request)[-1], columns))
            tokens.append(sampled[-1])
            if drafts[len(sampled) - 1 : len(sampled)] != sampled[-1:]:
                return sampled
            self.num_accepted_drafts += 1

    def _check(self, request: Request, num_tokens: int, prefixes: list[int]) -> None:
        """Compare every slot that attention reads with what must be there."""
        req_id = request.req_id
        first, tail = self._columns(req_id)
        plan = self.plans.get(req_id)
        for position in range(first * BLOCK_SIZE, num_tokens):
            column, offset = divmod(position, BLOCK_SIZE)
            if column < tail:
                expected: Any = ("compressed", req_id, first, tail, column, offset)
            else:
                planned = (0, 0) if plan is None else plan.columns(position)
                expected = _symbol(request, prefixes[position], planned)
            found = self.blocks[request.block_ids[column]][offset]
            assert found == expected, (
                f"{req_id}: column {column} offset {offset} holds {found}, must hold {expected}"
            )
            self.num_checked_slots += 1

    def _prefixes_of(self, request: Request, drafts: Sequence[int] = ()) -> list[int]:
        """For every position of a request, a number that stands for the tokens up to it."""
        known = self._prefixes.setdefault(request.req_id, [])
        tokens = self.tokens[request.req_id]
        known += _prefixes(tokens[len(known) :], known[-1] if known else 0)
        return known + _prefixes(drafts, known[-1]) if drafts else known


def _prefixes(tokens: Sequence[int], start: int = 0) -> list[int]:
    return list(itertools.accumulate(tokens, lambda *pair: hash(pair), initial=start))[1:]


def _next_token(prefix: int, columns: tuple[int, int]) -> int:
    return hash((prefix, columns)) % VOCABULARY


def _symbol(request: Request, prefix: int, columns: tuple[int, int]) -> tuple[Any, ...]:
    """K/V of a token: its prefix, and the columns it attended to."""
    owner = request.req_id if columns[0] else None
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
            self.manager.kv_cache_spec,
            num_blocks,
            self.scheduler.max_num_running_reqs,
            num_drafts,
        )
        self.num_rows = len(self.worker.ring)
        self.lag = 1 if async_scheduling else 0
        self.in_flight: deque[Any] = deque()
        self.answers: dict[str, list[int]] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self._ids = itertools.count()
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self.planner = getattr(self.scheduler, "planner", None)

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
        if self.planner is not None:
            dealer, requests = self.planner._dealer, self.planner.requests.values()
            rows = [r.ring_row for r in requests if r.ring_row is not None]
            pages = [page for r in requests for page in (r.score_pages or [[]])[0]]
            assert len(set(rows)) == len(rows) == self.num_rows - dealer.rows.num_free
            (pool,) = dealer.pages
            assert len(set(pages)) == len(pages) == pool.size - pool.num_free
