# SPDX-License-Identifier: Apache-2.0
"""vLLM's real Scheduler and KVCacheManager with a worker that computes with symbols.

Every slot of the pool holds a symbol that says what was written there (symbolic_cache.py), every
slot of a score page whose it is and which queries have scored it (symbolic_scores.py). Before a
request's next token is "computed", every slot that attention would read is compared with what must
be there; before a compaction, every score. A block that was handed out too early, written while
shared, hit although it was compressed, read by another group or compacted from a stale state shows
up as a wrong symbol.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from engine.build_scheduler import head_shares_of, scheduler_for
from engine.symbolic_cache import BLOCK_SIZE
from engine.symbolic_heads import SymbolicHeads
from engine.symbolic_worker import SymbolicWorker

from ems_vllm.engine.holding import Holding, holding_of
from ems_vllm.engine.orders import attached
from ems_vllm.engine.report import attach_report
from ems_vllm.engine.totals import Totals

# Of Totals, what is not a count.
_NOW = (
    *("num_blocks_saved", "num_bytes_saved", "num_pool_blocks"),
    *("diverged_lower_bound", "diverged_upper_bound", "guard_dense"),
)


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
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        specs = [manager.kv_cache_spec for manager in self.managers]
        shares, max_num_seqs = head_shares_of(compression), self.scheduler.max_num_running_reqs
        heads = None
        if shares is not None:
            num_columns = -(-self.scheduler.max_model_len // BLOCK_SIZE)
            heads = SymbolicHeads(specs, shares, num_blocks, max_num_seqs, num_columns)
        covers = "coverage" in (compression or {})
        # Whether what a request keeps depends on the load, so that only the scheduler knows.
        self.decides = (compression or {}).get("when") == "pressure"
        self.worker = SymbolicWorker(specs, num_blocks, max_num_seqs, num_drafts, heads, covers)
        self.lag = 1 if async_scheduling else 0
        self.in_flight: deque[Any] = deque()
        self.answers: dict[str, list[int]] = {}
        # By request, what the frontend was told last; and the sum of all totals.
        self.told: dict[str, Holding] = {}
        self.totals = Totals()
        self.num_steps = 0
        self.num_preemptions = 0
        self._ids = itertools.count()
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self.planner = getattr(self.scheduler, "planner", None)
        # Of one layer, whose group the builder makes.
        self.block_bytes = specs[0].page_size_bytes

    def add(
        self, prompt: list[int], max_tokens: int, extra_args: dict[str, Any] | None = None
    ) -> str:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        Simulator.num_events += 1
        number = next(self._ids)
        req_id = f"r{number}"
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=0, extra_args=extra_args
        )
        params.update_from_generation_config({}, eos_token_id=10**6)
        self.scheduler.add_request(
            Request(
                req_id,
                list(prompt),
                params,
                None,
                client_index=number % 2,
                block_hasher=self._hasher,
            )
        )
        return req_id

    @property
    def unfinished(self) -> list[str]:
        return list(self.scheduler.requests)

    def step(self) -> None:
        """Schedule one step; run and process the oldest one that is due."""
        Simulator.num_events += 1
        output = self.scheduler.schedule()
        if self.decides:
            self.worker.decide(output, self.planner.requests)
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
        if self.worker.report is not None:
            attach_report(result, self.worker.report)
        for outputs in self.scheduler.update_from_output(output, result).values():
            for item in outputs.outputs:
                self.answers.setdefault(item.request_id, []).extend(item.new_token_ids)
                if self.planner is not None:
                    self._check_told(item, attached(output))
        if self.planner is not None:
            self._check_totals()
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

    def tell_of_the_end(self) -> None:
        """The worker learns with a next step that all requests have ended, and holds nothing."""
        self.add([1], 1)
        self.drain()
        heads = self.worker.heads
        assert heads is None or heads.num_owners == 0

    def check(self) -> None:
        """Block accounting that must hold at any time."""
        held = [
            [
                block.block_id
                for blocks in manager.req_to_blocks.values()
                for block in blocks
                if not block.is_null
            ]
            for manager in self.managers
        ]
        references = Counter(itertools.chain.from_iterable(held))
        assert sum(len(set(ids)) for ids in held) == len(references), "groups share a block"
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == references[block.block_id], block
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(references)
        if self.planner is not None:
            self._check_dealer()
            self._check_prompts()
            if self.worker.kept is not None:
                self._check_reported()

    def _check_prompts(self) -> None:
        """A prompt that is compacted as it comes holds what its plan says, whatever its length."""
        for request in self.scheduler.running:
            tracked = self.planner.requests[request.request_id]
            if not tracked.compresses_within_prompt:
                continue
            for manager, ledger in zip(self.managers, tracked.ledgers, strict=True):
                held = manager.req_to_blocks[request.request_id]
                live = sum(not block.is_null for block in held)
                assert live <= ledger.plan.max_replay_columns(request.num_tokens), request

    def _check_dealer(self) -> None:
        dealer, requests = self.planner._dealer, self.planner.requests.values()
        rows = [r.ring_row for r in requests if r.ring_row is not None]
        assert len(set(rows)) == len(rows) == self.worker.ring.num_rows - dealer.rows.num_free
        dealt = [r.score_pages for r in requests if r.score_pages is not None]
        for group_id, pool in enumerate(dealer.pages):
            held = sum(len(pages[group_id]) for pages in dealt)
            assert held == pool.size - pool.num_free
        pages = [page for of_groups in dealt for of_group in of_groups for page in of_group]
        assert len(set(pages)) == len(pages), "a private score page was dealt twice"

    def _check_told(self, item: Any, orders: Any) -> None:
        """With every output, the frontend knows what the worker holds after its step."""
        if (holding := holding_of(item.kv_transfer_params)) is not None:
            self.told[item.request_id] = holding
        account = self.planner.accounts._accounts.get(item.request_id)
        is_finished = item.finish_reason is not None
        if not is_finished and (account.since is None or account.since > orders.step):
            # Preempted in a step that is on its way.
            return
        groups = range(len(self.managers))
        firsts = [self.worker.first_column(item.request_id, group_id) for group_id in groups]
        told = self.told.get(item.request_id)
        assert told is not None, f"{item.request_id}: the frontend knows nothing"
        assert told.num_entries_gone * len(groups) == sum(firsts) * BLOCK_SIZE, (told, firsts)
        compacted = any(order.req_id == item.request_id for order in orders.compactions)
        assert told.num_compactions > 0 or not compacted

    def _check_totals(self) -> None:
        found = self.planner.accounts.take_totals()
        if found is None:
            return
        for name, value in vars(found).items():
            if name == "num_ended":
                for outcome, count in value.items():
                    ended = self.totals.num_ended
                    ended[outcome] = ended.get(outcome, 0) + count
            elif name in _NOW:
                setattr(self.totals, name, value)
            else:
                setattr(self.totals, name, getattr(self.totals, name) + value)
        if self.in_flight:
            return
        saved = set()
        for req_id, tracked in self.planner.requests.items():
            for group_id in range(len(self.managers)) if not tracked.is_new else ():
                num_gone = self.worker.first_column(req_id, group_id)
                saved.update((group_id, *each) for each in self._contents(req_id, num_gone))
        assert self.totals.num_blocks_saved == len(saved)
        assert self.totals.num_bytes_saved == len(saved) * self.block_bytes

    def _contents(self, req_id: str, num_columns: int) -> Iterator[tuple[Any, ...]]:
        """What tells its leading columns from others, as the prefix cache does."""
        tokens, content = self.scheduler.requests[req_id].all_token_ids, 0
        owner = None if self.managers[0].enable_caching else req_id
        for first in range(0, num_columns * BLOCK_SIZE, BLOCK_SIZE):
            content = hash((content, *tokens[first : first + BLOCK_SIZE]))
            yield owner, first, content

    def _check_reported(self) -> None:
        """The scheduler holds what the worker keeps, and no more."""
        orders = [attached(output) for output in self.in_flight]
        changing = {order.req_id for step in orders for order in step.compactions}
        changing.update(req_id for step in orders for req_id in step.admitted)
        for request in self.scheduler.running:
            tracked = self.planner.requests[request.request_id]
            if tracked.is_new or request.request_id in changing:
                continue
            # What the latest output made free goes back when the request is scheduled next.
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            for group_id, ledger in enumerate(tracked.ledgers):
                first = self.worker.first_column(request.request_id, group_id)
                assert ledger.columns_to_free(processed) == first, (request, ledger)
