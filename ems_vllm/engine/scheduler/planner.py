# SPDX-License-Identifier: Apache-2.0
"""Decides what every step compacts, scores and records.

The one place where a request's CompressionPlan is evaluated. A worker is told the outcome
(`orders.StepOrders`) and derives nothing.

What is dealt out to requests for that (dealer.py) is dealt when a chunk reaches so far that it is
needed. A request that finds none does not run any further in this step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from ems_vllm.config.request import RequestOptions
from ems_vllm.engine.orders import Compaction, RecordedQueries, ScoredChunk, StepOrders
from ems_vllm.engine.scheduler.accounts import Accounts, Pool
from ems_vllm.engine.scheduler.compaction_ledger import CompactionLedger, OrderedCompaction
from ems_vllm.engine.scheduler.dealer import Dealer
from ems_vllm.engine.scheduler.request import NEVER, SchedulerRequest
from ems_vllm.plan import prompt_blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from ems_vllm._C import CompressionPlan
    from ems_vllm.engine.report import StepReport
    from ems_vllm.engine.scheduler.guard import Guard
    from ems_vllm.engine.scheduler.kv_cache_manager import CompressedAttentionManager
    from ems_vllm.engine.scheduler.pressure import Pressure


class Planner:
    """Decides for one scheduler.

    Args:
        managers: Of the compressed KV-cache groups.
        num_blocks: Blocks of the cache.
        block_bytes: Of one, on all devices.
        max_num_seqs: Most requests that run at a time.
        decode_query_len: Tokens of a decoding request in a step, drafts included.
        cuts_anywhere: Whether a chunk may end wherever it suits. Where states of Mamba layers are
            cached, vLLM cuts at blocks; then a request that is short of something waits instead of
            advancing a little, and a last chunk may look like a decoding step.
        num_sinks: First tokens of a prompt that always stay.
        is_reported: Whether workers report what they kept, because a coverage decides.
        pressure: Says whether what is admitted is compressed; None for always.
        guard: Chooses requests that are measured, and judges them; None for nobody.

    Attributes:
        requests: By id, from their first look-up in the prefix cache on.
        accounts: What compactions did, for the frontend.
    """

    def __init__(
        self,
        managers: Sequence[CompressedAttentionManager],
        num_blocks: int,
        block_bytes: int,
        max_num_seqs: int,
        decode_query_len: int,
        cuts_anywhere: bool = True,
        num_sinks: int = 0,
        is_reported: bool = False,
        pressure: Pressure | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.requests: dict[str, SchedulerRequest] = {}
        self._managers = list(managers)
        self._by_group = {manager.kv_cache_group_id: manager for manager in managers}
        self._decode_query_len = decode_query_len
        self._cuts_anywhere = cuts_anywhere
        self._num_sinks = num_sinks
        observation = managers[0].group_spec.observation
        self._obs_window = observation.obs_window
        self._scores = observation.score_tokens is not None
        self._dealer = Dealer(
            [manager.group_spec for manager in managers], num_blocks, max_num_seqs
        )
        # By step, compactions of which a report is to come.
        self._unreported: dict[int, list[OrderedCompaction]] = {}
        self._is_reported = is_reported
        self._pressure = pressure
        self._guard = guard
        self.accounts = Accounts(
            {manager.kv_cache_group_id: manager.block_size for manager in managers},
            # One of them stands for columns that were given back.
            Pool(num_blocks - 1, block_bytes),
            self._contents_of,
            guard,
        )
        self._num_steps = 0
        # Whether a request that is to be admitted must wait in the step that is being scheduled.
        self._queue_waits = False
        self._ended: list[str] = []
        for index, manager in enumerate(managers):
            manager.follow(self.requests, index)

    # -- admission and end ---------------------------------------------------------------------

    def admit(self, request: Request) -> int | None:
        """Take note of a request that is about to be scheduled for the first time, or again.

        Returns:
            The longest prefix-cache hit it may use, in tokens; None for no limit.
        """
        tracked = self.requests.get(request.request_id)
        if tracked is None or (tracked.is_ample and tracked.is_new and self._is_under(request)):
            tracked = self.requests[request.request_id] = self._track(request)
        limit, first_hit = tracked.max_shared_tokens, tracked.first_hit
        if limit is None or first_hit is None or not self._scores or not tracked.compresses_prompt:
            return limit
        # A preempted request finds its own prompt in the cache. Queries that scored at first have
        # to score again, or the preemption would change the answer.
        return first_hit if tracked.first_scored_query(0) < limit else limit

    def _is_under(self, request: Request) -> bool:
        """Whether a request is compressed that does not ask for it: under pressure, or always."""
        return self._pressure is None or self._pressure.is_high(request)

    def blocks_of(self, request: Request, num_tokens: int) -> int:
        """Blocks that it holds of so many tokens, prompt over; dense, where it is not tracked."""
        tracked = self.requests.get(request.request_id)
        blocks = 0
        for index, manager in enumerate(self._managers):
            columns = -(-num_tokens // manager.block_size)
            if tracked is not None and not tracked.is_off:
                columns = min(columns, tracked.ledgers[index].plan.max_live_columns(num_tokens))
            blocks += columns
        return blocks

    def _track(self, request: Request) -> SchedulerRequest:
        params = request.sampling_params
        options = RequestOptions.parse_admitted(params.extra_args if params else None)
        if options.enabled and not options.is_asked_for and not self._is_under(request):
            plans = self._plans(request, RequestOptions(enabled=False))
            return SchedulerRequest(request, tuple(map(CompactionLedger, plans)), is_ample=True)
        is_spared = self._keeps_whole(request, options)
        if is_spared:
            options = RequestOptions(enabled=False)
        plans = self._plans(request, options)
        if options.protect:
            num_tokens = request.num_prompt_tokens + request.max_tokens
            options = options.checked_again(
                request.num_prompt_tokens, num_tokens, plans, self._num_sinks
            )
            plans = self._plans(request, options)
        return SchedulerRequest(
            request,
            tuple(map(CompactionLedger, plans)),
            protected=options.protect.ranges if options.protect else (),
            is_measured=self._guard is not None and self._guard.measures(request.request_id),
            is_spared=is_spared,
        )

    def _keeps_whole(self, request: Request, options: RequestOptions) -> bool:
        """Whether the guard has a request keep its whole cache, which says nothing itself."""
        if self._guard is None or not options.enabled or options.is_asked_for:
            return False
        return self._guard.keeps_whole(request.request_id)

    def _plans(self, request: Request, options: RequestOptions) -> list[CompressionPlan]:
        """By compressed group."""
        return [
            manager.group_spec.settings.plan(request.num_prompt_tokens, manager.block_size, options)
            for manager in self._managers
        ]

    def released(self, request: Request) -> None:
        """The request gave its blocks back: it was preempted, or has finished."""
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            return
        if not tracked.is_new:
            self._ended.append(request.request_id)
        self._dealer.take_back_row(tracked)
        self._dealer.take_back_pages(tracked)
        tracked.restart()
        self.accounts.released(request.request_id, request.is_finished())
        if request.is_finished():
            if self._pressure is not None:
                self._pressure.ended(request)
            del self.requests[request.request_id]

    # -- while a step is scheduled -------------------------------------------------------------

    def limit_chunk(self, request: Request, start: int, num_tokens: int) -> int:
        """How many of `num_tokens` a step of this request may process; 0 makes it wait.

        A step never runs across a compaction: a request that was preempted computes its generated
        tokens again, many at a time, and ends every chunk where a compaction falls due, so that
        each token attends to what it attended to at first.

        Args:
            request: An admitted request.
            start: Tokens processed before the step.
            num_tokens: What vLLM would schedule.
        """
        tracked = self.requests[request.request_id]
        if not tracked.is_new:
            return self._limit(tracked, start, num_tokens)
        # From 0.33 on vLLM goes on to the next in the queue. Those that need little would always
        # come before one that needs much, so whoever is behind one that waits, waits too.
        num_tokens = 0 if self._queue_waits else self._limit(tracked, start, num_tokens)
        self._queue_waits = num_tokens == 0
        return num_tokens

    def _limit(self, tracked: SchedulerRequest, start: int, num_tokens: int) -> int:
        if start + num_tokens <= tracked.quiet_until:
            return num_tokens
        if tracked.is_new:
            tracked.num_cached = start
        if tracked.waits_for_blocks(start):
            return 0
        due = tracked.next_compaction(start)
        if due == NEVER:
            return num_tokens
        num_tokens = min(num_tokens, due - start)
        recorded_from = due - self._obs_window
        scores = self._scores and tracked.compresses_prompt and start < tracked.prompt_len
        if scores:
            needed_from = min(tracked.first_scored_query(start), recorded_from)
            if start + num_tokens > needed_from and not self._dealer.deal_pages(tracked):
                num_tokens = self._until(needed_from, start)
        if (
            self._obs_window
            and start + num_tokens > recorded_from
            and not self._dealer.deal_row(tracked)
        ):
            num_tokens = self._until(recorded_from, start)
        if scores and self._cuts_anywhere:
            num_tokens = self._unlike_decoding(due - start, num_tokens)
        return num_tokens

    def _until(self, position: int, start: int) -> int:
        """Tokens to a position from which on something is needed that there is none of."""
        return max(0, position - start) if self._cuts_anywhere else 0

    def _unlike_decoding(self, remaining: int, num_tokens: int) -> int:
        """At most `num_tokens`, so that this chunk and what is left exceed a decoding step.

        What is left of a prompt, or of it until it is compacted. 0 where that cannot be. A batch
        in which no request has more tokens than a decoding one replays the CUDA graph of decoding
        batches, which scores nothing.
        """
        longest = self._decode_query_len
        if num_tokens < remaining <= num_tokens + longest:
            num_tokens = remaining - longest - 1
        return num_tokens if num_tokens > longest or num_tokens == remaining else 0

    # -- once it is scheduled ------------------------------------------------------------------

    def orders(self, output: SchedulerOutput) -> StepOrders:
        """What the workers do in the step that was just scheduled.

        Args:
            output: vLLM's, with the tokens of the step counted as computed already.
        """
        self._num_steps += 1
        self._queue_waits = False
        orders = StepOrders(self._num_steps, ended=self._ended)
        self._ended = []
        self._dealer.take_back_unused(output.num_scheduled_tokens)
        scheduled = []
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            tracked = self.requests[req_id]
            end = tracked.request.num_computed_tokens
            orders.starts.append(end - num_tokens)
            scheduled.append(tracked)
            if end > tracked.quiet_until:
                self._order(tracked, end - num_tokens, end, orders)
        for index, manager in enumerate(self._managers):
            orders.first_columns[manager.kv_cache_group_id] = [
                tracked.ledgers[index].first for tracked in scheduled
            ]
            if self._is_reported:
                orders.freed_columns[manager.kv_cache_group_id] = [
                    tracked.ledgers[index].num_freed for tracked in scheduled
                ]
        return orders

    def processed(self, orders: StepOrders, report: StepReport | None) -> None:
        """The output of a step has come, and what a worker reports with it.

        Raises:
            RuntimeError: the report is missing, or is of other compactions.
        """
        if self._is_reported:
            self._reported(orders, report)
        if orders.compactions:
            planned = [order.first for order in orders.compactions]
            firsts = report.first_columns if self._is_reported and report else planned
            self.accounts.compacted(orders.step, orders.compactions, firsts)
        if report is not None and report.measured is not None:
            self.accounts.measured(report.measured)

    def _contents_of(self, req_id: str, group_id: int, first: int, end: int) -> Sequence[Hashable]:
        manager = self._by_group[group_id]
        return manager.column_hashes(self.requests[req_id].request, first, end)

    def _reported(self, orders: StepOrders, report: StepReport | None) -> None:
        ordered = self._unreported.pop(orders.step, [])
        found = [] if report is None else report.first_columns
        if len(found) != len(ordered):
            raise RuntimeError(
                f"KV-cache compression: step {orders.step} compacted {len(ordered)} times, and its "
                f"output reports {len(found)}; the engine stops, because it does not know which "
                "columns are free."
            )
        for compaction, first in zip(ordered, found, strict=True):
            compaction.kept_from(first)

    def _order(self, tracked: SchedulerRequest, start: int, end: int, orders: StepOrders) -> None:
        """Add what a request's step from `start` to `end` asks for."""
        if tracked.is_new:
            self._begin(tracked, start, orders)
        due = tracked.next_compaction(start)
        is_recorded = self._obs_window > 0 and end > due - self._obs_window
        if self._compact(tracked, start, orders):
            self._dealer.take_back_pages(tracked)
            if not is_recorded:
                self._dealer.take_back_row(tracked)
        if self._scores and tracked.compresses_prompt:
            self._score(tracked, start, end, orders)
        if is_recorded:
            assert tracked.ring_row is not None
            num_queries = min(end - start, end - due + self._obs_window)
            orders.recorded.append(
                RecordedQueries(tracked.request.request_id, tracked.ring_row, num_queries)
            )
        tracked.quiet_until = self._quiet_until(tracked, end, due)

    def _begin(self, tracked: SchedulerRequest, start: int, orders: StepOrders) -> None:
        tracked.is_new = False
        tracked.num_cached = start
        if tracked.first_hit is None:
            tracked.first_hit = start
        req_id = tracked.request.request_id
        orders.admitted.append(req_id)
        self.accounts.admitted(req_id, orders.step, tracked.outcome_otherwise)

    def _quiet_until(self, tracked: SchedulerRequest, end: int, due: int) -> int:
        if tracked.compresses_prompt and end < tracked.prompt_len:
            return 0
        return due - self._obs_window if due != NEVER else NEVER

    def _compact(self, tracked: SchedulerRequest, start: int, orders: StepOrders) -> bool:
        """Order the compactions that fall due; whether there is one."""
        compacted = False
        for index, ledger in enumerate(tracked.ledgers):
            before = (ledger.first, ledger.tail)
            if ordered := ledger.step_scheduled(start):
                orders.compactions.append(self._compaction(tracked, index, start, before))
                if self._is_reported:
                    self._unreported.setdefault(orders.step, []).append(ordered)
                ledger.accumulated_until = start
                compacted = True
        if compacted and tracked.is_measured and self._guard is not None:
            self._guard.ordered(tracked.request.request_id)
        return compacted

    def _compaction(
        self, tracked: SchedulerRequest, index: int, start: int, before: tuple[int, int]
    ) -> Compaction:
        manager, ledger = self._managers[index], tracked.ledgers[index]
        plan, (first_before, tail_before) = ledger.plan, before
        is_of_prompt = plan.compresses_prompt and start <= tracked.prompt_len
        num_scored = 0
        if self._scores and is_of_prompt:
            num_scored = (ledger.tail - first_before) * manager.block_size
        elif self._scores and first_before > 0:
            num_scored = (tail_before - first_before) * manager.block_size
        return Compaction(
            req_id=tracked.request.request_id,
            group_id=manager.kv_cache_group_id,
            first_before=first_before,
            first=ledger.first,
            tail=ledger.tail,
            num_computed=start,
            block_ids=manager.block_ids(tracked.request.request_id, first_before, start),
            score_pages=tracked.score_pages_of(index),
            num_scored=num_scored,
            num_represented=0 if is_of_prompt else start - ledger.accumulated_until,
            ring_row=-1 if tracked.ring_row is None else tracked.ring_row,
            num_queries=min(self._obs_window, start - tracked.num_cached),
            prompt_blocks=prompt_blocks(tracked.prompt_len, plan.recent_window, plan.block_size),
            protected=tracked.protected,
            num_kept=ledger.num_kept.get(ledger.tail, 0),
            is_measured=tracked.is_measured,
        )

    def _score(self, tracked: SchedulerRequest, start: int, end: int, orders: StepOrders) -> None:
        first_scored = tracked.first_scored_query(start)
        first_query, seq_len = max(start, first_scored), min(end, tracked.prompt_len)
        if first_query >= seq_len:
            return
        for index, manager in enumerate(self._managers):
            ledger = tracked.ledgers[index]
            if not ledger.plan.compresses_prompt:
                continue
            assert ledger.first > 0 or tracked.score_pages is not None
            # Where all queries score, what was kept has the scores of those before.
            carries = ledger.first > 0 and ledger.plan.global_queries is None
            is_fresh = start <= first_scored and not carries
            orders.scored.append(
                ScoredChunk(
                    req_id=tracked.request.request_id,
                    group_id=manager.kv_cache_group_id,
                    first_query=first_query,
                    seq_len=seq_len,
                    first_column=ledger.first,
                    num_accumulated=0 if is_fresh else start - ledger.first * manager.block_size,
                    block_ids=manager.block_ids(tracked.request.request_id, ledger.first, seq_len),
                    score_pages=tracked.score_pages_of(index),
                )
            )
