# SPDX-License-Identifier: Apache-2.0
"""A worker that computes with symbols, obeys real orders, and checks all that it reads.

It acts in the most hostile order that vLLM allows: blocks are poisoned as soon as they are
allocated, and a step runs as late as possible, just before its output is processed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.block_tables import BlockTables, Request
from engine.symbolic_cache import (
    BLOCK_SIZE,
    VOCABULARY,
    Columns,
    State,
    SymbolicCache,
    kv,
    next_token,
    prefixes,
)
from engine.symbolic_heads import SymbolicHeads
from engine.symbolic_ring import SymbolicRing
from engine.symbolic_scores import Scoring, SymbolicScores

from ems_vllm.config import RequestOptions
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.orders import attached
from ems_vllm.engine.report import StepReport
from ems_vllm.engine.worker.kept_columns import KeptColumns
from ems_vllm.engine.worker.requests import WorkerRequests


class SymbolicWorker:
    """Keeps the real record of what it holds.

    Block tables are followed as a model runner follows them, from vLLM's own output, and compared
    with what the orders name.

    Args:
        specs: Of the KV-cache groups; all compressed, or a single one that is not.
        num_blocks: Size of the pool.
        max_num_seqs: Most requests that run at a time.
        num_drafts: Drafted tokens of a decoding request.
        heads: The pages of kv_heads that own different numbers; None where all own as many.
        covers: Whether a compaction may keep less than is planned, as a coverage does.
    """

    def __init__(
        self,
        specs: Sequence[Any],
        num_blocks: int,
        max_num_seqs: int,
        num_drafts: int = 0,
        heads: SymbolicHeads | None = None,
        covers: bool = False,
    ) -> None:
        self.cache = SymbolicCache(num_blocks)
        self.heads = heads
        self.table = BlockTables()
        self.num_drafts = num_drafts
        self.specs = [spec for spec in specs if isinstance(spec, CompressedAttentionSpec)]
        assert len(self.specs) in (0, len(specs))
        self.residents = WorkerRequests()
        self.scores: SymbolicScores | None = None
        self.ring = SymbolicRing(0, 0)
        if self.specs:
            if self.specs[0].observation.score_tokens is not None:
                pages = num_blocks + sum(spec.num_score_pages for spec in self.specs)
                self.scores = SymbolicScores(pages)
            rows = min(spec.num_ring_rows(num_blocks, max_num_seqs) for spec in self.specs)
            self.ring = SymbolicRing(rows, self.specs[0].observation.obs_window)
        # Their record of what is held is real, too.
        self.kept = KeptColumns(dict.fromkeys(range(len(specs)), BLOCK_SIZE)) if covers else None
        self.report: StepReport | None = None
        # By request and group: columns that were kept, by the column behind them.
        self.decided: dict[tuple[str, int], dict[int, int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.first_hits: dict[str, int] = {}
        self.plans: dict[str, list[Any]] = {}
        self._decided_plans: dict[tuple[int, str], list[Any]] = {}
        # By group, the first ones of prompts that were too short apart.
        self.num_compactions = [0] * len(specs)
        # Those of them before a prompt had ended.
        self.num_within_prompts = [0] * len(specs)
        self.num_late_compactions = [0] * len(specs)
        self.num_accepted_drafts = 0
        self._nothing: State = ((0, 0),) * len(specs)
        self._compacted: dict[str, State] = {}
        # By request and group: tokens at the latest compaction since it was admitted.
        self._compacted_at: dict[tuple[str, int], int] = {}
        self._prefixes: dict[str, list[int]] = {}
        self._states: dict[str, list[State]] = {}

    def decide(self, output: Any, tracked: Mapping[str, Any]) -> None:
        """Plans of requests that are admitted in a step, where they depend on the load."""
        for req_id in attached(output).admitted:
            plans = [ledger.plan for ledger in tracked[req_id].ledgers]
            self._decided_plans[attached(output).step, req_id] = plans

    def execute(self, output: Any) -> dict[str, list[int]]:
        """Run one step; returns the sampled tokens by request."""
        admitted, scheduled = self.table.update(output)
        for req_id in attached(output).admitted if self._decided_plans else ():
            plans = self._decided_plans.pop((attached(output).step, req_id), None)
            if plans is not None:
                # It begins anew, maybe with another plan.
                self.plans[req_id] = plans
                self._states.pop(req_id, None)
                self.first_hits.pop(req_id, None)
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
            for group_id in range(len(self._nothing)):
                self._compacted_at.pop((request.req_id, group_id), None)
        self._poison_new_blocks(output)
        orders = attached(output)
        if self.specs:
            orders = self._obey(orders, output, {request.req_id: request for request in scheduled})
        drafts = output.scheduled_spec_decode_tokens
        for request in scheduled:
            self._write(request, drafts.get(request.req_id, []))
        if self.heads is not None and scheduled:
            self.heads.check(
                scheduled,
                lambda request, group_id: self._symbols(
                    request, group_id, request.end, drafts.get(request.req_id, [])
                ),
            )
        if self.specs:
            self._observe(orders, scheduled)
        return {
            request.req_id: self._sample(request, drafts.get(request.req_id, []))
            for request in scheduled
        }

    def first_column(self, req_id: str, group_id: int) -> int:
        """The first live column of a request."""
        return self._state(req_id)[group_id][0]

    def draft(self, req_id: str, length: int) -> list[int]:
        """Drafts of a request's next tokens; the first ones are mostly right."""
        state = self._state(req_id)
        tokens = list(self.tokens[req_id])
        drafts = []
        for index in range(length):
            token = next_token(prefixes(tokens)[-1], state)
            wrong = len(tokens) % (index + 2) == 0
            drafts.append((token + 1) % VOCABULARY if wrong else token)
            tokens.append(drafts[-1])
        return drafts

    # -- what must hold ------------------------------------------------------------------------

    def _plan(self, new: Any) -> None:
        """From the settings; nothing of it is asked when orders are obeyed."""
        if self.specs and new.req_id not in self.plans:
            options = RequestOptions.parse(new.sampling_params.extra_args)
            self.plans[new.req_id] = [
                spec.settings.plan(new.prompt_len, BLOCK_SIZE, options) for spec in self.specs
            ]

    def _planned_states(self, req_id: str, num_tokens: int) -> list[State]:
        """For every token, the state under which it must have been computed."""
        plans = self.plans.get(req_id)
        if plans is None:
            return [self._nothing] * num_tokens
        known = self._states.setdefault(req_id, [])
        for position in range(len(known), num_tokens):
            columns = [plan.columns(position) for plan in plans]
            known.append(tuple(self._held(req_id, *item) for item in enumerate(columns)))
        return known[:num_tokens]

    def _held(self, req_id: str, group_id: int, planned: Columns) -> Columns:
        """Of the columns that may hold kept entries, those that do."""
        first, tail = planned
        kept = self.decided.get((req_id, group_id), {}).get(tail)
        return (first if kept is None else tail - kept, tail)

    def _is_of_prompt(self, order: Any, request: Request) -> bool:
        """Whether the prompt's queries score for a compaction, recorded ones beside them."""
        plan = self.plans[order.req_id][order.group_id]
        return plan.compresses_prompt and order.num_computed <= request.prompt_len

    def _scoring(self, order: Any, request: Request) -> Scoring | None:
        """Which queries score for a compaction, in all groups the same; None where none does."""
        if not self._is_of_prompt(order, request):
            return None
        plans = self.plans[order.req_id]
        earliest = min(
            plan.first_scored_query(order.num_computed - 1)
            for plan in plans
            if plan.compresses_prompt
        )
        first = max(self.first_hits[order.req_id], earliest)
        if not order.first_before or plans[order.group_id].global_queries is not None:
            return Scoring(False, first, first)
        return Scoring(True, first, self.first_hits[order.req_id])

    def _prefixes_of(self, request: Request, drafts: Sequence[int] = ()) -> list[int]:
        """For every position of a request, a number that stands for the tokens up to it."""
        known = self._prefixes.setdefault(request.req_id, [])
        tokens = self.tokens[request.req_id]
        known += prefixes(tokens[len(known) :], known[-1] if known else 0)
        return known + prefixes(drafts, known[-1]) if drafts else known

    def _symbols(
        self, request: Request, group_id: int, num_tokens: int, drafts: Sequence[int] = ()
    ) -> list[Any]:
        """What every token must have written in a group."""
        states = self._planned_states(request.req_id, num_tokens)
        known = self._prefixes_of(request, drafts)[:num_tokens]
        return [kv(request, group_id, *of_token) for of_token in zip(known, states, strict=True)]

    def _state(self, req_id: str) -> State:
        """What is compressed now."""
        return self._compacted.get(req_id, self._nothing)

    # -- a step --------------------------------------------------------------------------------

    def _poison_new_blocks(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            for ids in new.block_ids:
                self._poison(ids[new.num_computed_tokens // BLOCK_SIZE :])
        cached = output.scheduled_cached_reqs
        for req_id, computed, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            resumed = req_id in cached.resumed_req_ids
            for ids in block_ids or ():
                self._poison(ids[computed // BLOCK_SIZE if resumed else 0 :])

    def _poison(self, block_ids: Sequence[int]) -> None:
        self.cache.poison(block_ids)
        if self.heads is not None:
            self.heads.poison(block_ids)

    def _obey(self, orders: Any, output: Any, requests: dict[str, Request]) -> Any:
        """Compact; what is left to do."""
        self.residents.begin_step(orders)
        starts = [request.num_computed for request in requests.values()]
        assert orders.starts == starts, (orders.starts, starts)
        if self.heads is not None:
            self.heads.begin_step(
                output,
                requests,
                lambda request, group_id: self._symbols(request, group_id, request.num_computed),
            )
        self.residents.compact(orders.compactions)
        if self.kept is None:
            for order in orders.compactions:
                self._compact(order, requests[order.req_id])
        self.residents.check_first_columns(output.num_scheduled_tokens, orders)
        for chunk in orders.scored:
            self.residents.scored(chunk)
        for queries in orders.recorded:
            self.residents.recorded(queries, requests[queries.req_id].end)
        return orders if self.kept is None else self._cover(self.kept, orders, requests)

    def _cover(self, kept: KeptColumns, planned: Any, requests: dict[str, Request]) -> Any:
        """Compact what is held, and keep what this worker likes of it."""
        kept.release(planned.ended)
        kept.check_freed(planned, list(requests))
        orders = [self._decide(order) for order in kept.compactions(planned.compactions)]
        for order in orders:
            self._compact(order, requests[order.req_id])
        kept_from = {(order.req_id, order.group_id): order.first for order in orders}
        self.report = StepReport(kept.keep(kept_from))
        return kept.held(planned, list(requests))

    def _decide(self, order: Any) -> Any:
        decided = self.decided.setdefault((order.req_id, order.group_id), {})
        if order.num_kept:
            # The same as before a preemption.
            assert order.num_kept == decided[order.tail], order
            return order
        assert order.tail not in decided, "decided twice"
        most = order.tail - order.first
        least = max(1, order.kept_before)
        # As if it had scored; rarely as much as it may.
        salt = hash((tuple(self.tokens[order.req_id][: order.num_computed]), order.group_id))
        decided[order.tail] = least + salt % (1 + (most - least) // 2)
        return order._replace(first=order.tail - decided[order.tail])

    def _compact(self, order: Any, request: Request) -> None:
        group_id, before = order.group_id, self._state(order.req_id)
        columns = -(-order.num_computed // BLOCK_SIZE)
        table = request.tables[group_id]
        assert order.first_before == before[group_id][0], (order, before)
        assert order.block_ids == table[order.first_before : columns], order
        self._check(request, group_id, order.num_computed, self._prefixes_of(request))
        self.ring.check(order)
        self._check_represented(order, request)
        if self.scores is not None:
            self.scores.check(order, before[group_id], self._scoring(order, request))
            self.scores.carry(order, request)
        after = (order.first, order.tail)
        self.cache.compress(request, group_id, after)
        self._compacted[order.req_id] = (*before[:group_id], after, *before[group_id + 1 :])
        late = not order.first_before and not self.plans[order.req_id][group_id].compresses_prompt
        counts = self.num_late_compactions if late else self.num_compactions
        counts[group_id] += 1
        self.num_within_prompts[group_id] += order.num_computed < request.prompt_len

    def _check_represented(self, order: Any, request: Request) -> None:
        """The recorded queries stand for all tokens whose queries were never scored."""
        plan, key = self.plans[order.req_id][order.group_id], (order.req_id, order.group_id)
        since = self._compacted_at.get(key, request.prompt_len if plan.compresses_prompt else 0)
        expected = 0 if self._is_of_prompt(order, request) else order.num_computed - since
        assert order.num_represented == expected, (order, since)
        self._compacted_at[key] = order.num_computed

    def _write(self, request: Request, drafts: list[int]) -> None:
        known = self._prefixes_of(request, drafts)
        state = self._state(request.req_id)
        self.cache.write(request, known, state)
        for group_id in range(len(request.tables)):
            self._check(request, group_id, request.end, known)
            if self.heads is not None:
                of_step = known[request.num_computed : request.end]
                symbols = [kv(request, group_id, prefix, state) for prefix in of_step]
                self.heads.write(request, group_id, symbols)

    def _check(
        self, request: Request, group_id: int, num_tokens: int, known: Sequence[int]
    ) -> None:
        columns = self._state(request.req_id)[group_id]
        states = self._planned_states(request.req_id, num_tokens)
        self.cache.check(request, group_id, columns, known, states)

    def _observe(self, orders: Any, requests: list[Request]) -> None:
        """Queries that are recorded, and those that score."""
        self.ring.record(orders, requests)
        by_id = {request.req_id: request for request in requests}
        for chunk in orders.scored:
            request = by_id[chunk.req_id]
            # A batch of nothing else would replay the CUDA graph of decoding, which scores none.
            assert request.num_scheduled > self.num_drafts + 1, chunk
            # Attention was over what is held, so scores are, too.
            assert chunk.first_column == self.first_column(chunk.req_id, chunk.group_id), chunk
            assert self.scores is not None
            self.scores.score(chunk, request)
            if self.heads is not None:
                self.heads.score(chunk)

    def _sample(self, request: Request, drafts: list[int]) -> list[int]:
        tokens = self.tokens[request.req_id]
        if request.end < len(tokens):
            return []
        assert request.end == len(tokens) + len(drafts)
        state = self._state(request.req_id)
        sampled: list[int] = []
        while True:
            sampled.append(next_token(self._prefixes_of(request)[-1], state))
            tokens.append(sampled[-1])
            if drafts[len(sampled) - 1 : len(sampled)] != sampled[-1:]:
                return sampled
            self.num_accepted_drafts += 1
