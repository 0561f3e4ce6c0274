# SPDX-License-Identifier: Apache-2.0
"""I3 by simulation: no leak, no double free, no shared write, no block handed out too early."""

import pytest
from engine.simulator import Simulator
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ems_vllm.engine.compaction_ledger import CompactionLedger
from ems_vllm.engine.dealer import Dealer
from ems_vllm.engine.kv_cache_manager import CompressedAttentionManager
from ems_vllm.engine.planner import Planner
from ems_vllm.engine.pools import Pool
from ems_vllm.engine.residents import Residents, StepRefused
from ems_vllm.engine.tracked_request import TrackedRequest

SETTINGS = {
    "recipe": "ems",
    "budget": 8,
    "recent_window": 4,
    "obs_window": 2,
    "recompress_interval": 8,
    "min_blocks_saved": 1,
    # Few of both, so that requests have to wait for them.
    "prefix_score_tokens": 96,
    "query_ring_rows": 2,
}
# A few prompts that share prefixes of different lengths, so that hits are frequent.
BASE = list(range(60))
PROMPTS = st.builds(
    lambda shared, own: BASE[:shared] + [100 + token for token in own],
    st.integers(0, 60),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
)
REQUEST_SETTINGS = st.sampled_from(
    [None, None, None, {"kv_compression": "off"}, {"kv_budget": 4}, {"kv_ratio": 0.1}]
)


class SchedulingMachine(RuleBasedStateMachine):
    """Arrivals, steps, aborts, preemptions and cache resets in any order."""

    @initialize(
        # vLLM schedules synchronously where n-grams are drafted.
        mode=st.sampled_from(["sync", "async", "drafts"]),
        recompress_interval=st.sampled_from([0, 4, 8]),
        num_blocks=st.sampled_from([32, 48, 80]),
        max_num_batched_tokens=st.sampled_from([10, 24, 64]),
        method=st.sampled_from(
            [("ems", "all"), ("ems", 6), ("ems", 1), ("snapkv", 6), ("knorm", 6)]
        ),
    )
    def start(self, mode, recompress_interval, num_blocks, max_num_batched_tokens, method):
        recipe, global_queries = method
        self.compression = {
            **SETTINGS,
            "recipe": recipe,
            "global_queries": global_queries,
            "recompress_interval": recompress_interval,
        }
        self.options = {"max_num_batched_tokens": max_num_batched_tokens}
        self.simulator = Simulator(
            self.compression,
            num_blocks=num_blocks,
            async_scheduling=mode == "async",
            num_drafts=3 if mode == "drafts" else 0,
            **self.options,
        )
        self.asked = {}

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 30), extra_args=REQUEST_SETTINGS)
    def arrive(self, prompt, max_tokens, extra_args):
        req_id = self.simulator.add(prompt, max_tokens, extra_args)
        self.asked[req_id] = (prompt, max_tokens, extra_args)

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            if self.simulator.unfinished:
                self.simulator.step()

    @precondition(lambda self: self.simulator.unfinished)
    @rule(index=st.integers(0, 7))
    def abort(self, index):
        unfinished = self.simulator.unfinished
        req_id = unfinished[index % len(unfinished)]
        self.simulator.abort(req_id)
        del self.asked[req_id]

    @rule(index=st.integers(0, 7))
    def preempt(self, index):
        self.simulator.preempt(index)

    @rule(preempts=st.booleans())
    def reset_prefix_cache(self, preempts):
        self.simulator.scheduler.reset_prefix_cache(reset_running_requests=preempts)

    @invariant()
    def accounts_balance(self):
        if hasattr(self, "simulator"):
            self.simulator.check()

    def teardown(self):
        if not hasattr(self, "simulator"):
            return
        self.simulator.drain()
        assert self.simulator.pool.get_num_free_blocks() == self.simulator.pool.num_gpu_blocks - 1
        answers = self.simulator.answers
        for req_id, (prompt, max_tokens, extra_args) in self.asked.items():
            assert len(answers[req_id]) == max_tokens
            alone = Simulator(self.compression, num_blocks=80, **self.options)
            name = alone.add(prompt, max_tokens, extra_args)
            alone.drain()
            assert answers[req_id] == alone.answers[name], (req_id, prompt)


SchedulingMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20)
TestScheduling = SchedulingMachine.TestCase


def busy_runs():
    for mode in MODES:
        busy_run(**mode)


def busy_run(**options):
    """A fixed load in which everything happens: hits, preemptions, recompressions, late ones."""
    settings = {**SETTINGS, "global_queries": "all"}
    simulator = Simulator(settings, num_blocks=40, **options)
    for round_ in range(6):
        for index in range(5):
            prompt = [*BASE[: 10 * index + 5], 200 + index, 300 + round_ % 2]
            simulator.add(prompt, 12 + 6 * index)
        for _ in range(25 // (1 + options.get("num_drafts", 0))):
            if simulator.unfinished:
                simulator.step()
        simulator.preempt(round_)
    simulator.drain()
    return simulator


MODES = ({}, {"async_scheduling": True}, {"num_drafts": 3})


@pytest.mark.parametrize("mode", MODES, ids=["sync", "async", "drafts"])
def test_busy_run_exercises_what_the_planted_bugs_break(mode):
    simulator = busy_run(**mode)
    assert sum(simulator.worker.num_compactions) > 30
    assert simulator.num_preemptions > 6
    assert simulator.worker.cache.num_checked_slots > 10_000
    assert (simulator.worker.num_accepted_drafts > 100) == ("num_drafts" in mode)


def test_two_hundred_requests_at_once():
    """Long and short ones, shared prefixes, a pool that preempts: each answers as it does alone."""
    settings = {**SETTINGS, "budget": 64, "recent_window": 32, "recompress_interval": 32}
    settings["prefix_score_tokens"] = 4096
    settings["query_ring_rows"] = 16
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "async_scheduling": True}
    # 10 to 3,000 tokens, each step the same factor; every other one begins like the others.
    lengths = [round(10 * 300 ** (index / 199)) for index in range(200)]
    prompts = [
        [*(range(length // 2) if index % 2 else ()), *range(10**6 + index, 10**6 + index + length)]
        for index, length in enumerate(lengths)
    ]
    simulator = Simulator(settings, num_blocks=2000, **options)
    names = [simulator.add(prompt, 40) for prompt in prompts]
    for index, name in enumerate(names):
        simulator.step()
        if index % 5 == 4:
            simulator.abort(name)
    simulator.drain(limit=50_000)
    assert simulator.num_preemptions > 0
    assert sum(simulator.worker.num_compactions) > 200
    assert simulator.pool.get_num_free_blocks() == 1999
    # The same, one after the other.
    alone = Simulator(settings, num_blocks=2000, **options)
    for index in range(0, 200, 10):
        assert len(simulator.answers[names[index]]) == 40
        name = alone.add(prompts[index], 40)
        alone.drain()
        assert alone.answers[name] == simulator.answers[names[index]]


def _freed_one_step_early(monkeypatch):
    # The obvious rule: what the plan says for the tokens processed so far. The step that compacts
    # has not run then, it is just being scheduled.
    monkeypatch.setattr(
        CompactionLedger, "columns_to_free", lambda self, processed: self.plan.columns(processed)[0]
    )


def _hit_ends_a_block_too_late(monkeypatch):
    admit = Planner.admit

    def admit_more(self, request):
        limit = admit(self, request)
        return None if limit is None else limit + 4

    monkeypatch.setattr(Planner, "admit", admit_more)
    _compressed_columns_are_hashed(monkeypatch)


def _compressed_columns_are_hashed(monkeypatch):
    monkeypatch.setattr(
        CompressedAttentionManager,
        "cache_blocks",
        super(CompressedAttentionManager, CompressedAttentionManager).cache_blocks,
    )


def _worker_state_survives_a_preemption(monkeypatch):
    begin_step = Residents.begin_step

    def forgetful(self, orders):
        orders.ended.clear()
        orders.admitted[:] = [r for r in orders.admitted if r not in self._residents]
        return begin_step(self, orders)

    monkeypatch.setattr(Residents, "begin_step", forgetful)


def _chunk_runs_across_a_compaction(monkeypatch):
    limit_chunk = Planner.limit_chunk
    monkeypatch.setattr(
        Planner,
        "limit_chunk",
        lambda self, request, start, wanted: limit_chunk(self, request, start, wanted) and wanted,
    )


def _message_edited(monkeypatch, edit):
    """Lets `edit` change, or replace, the orders of every step."""
    orders = Planner.orders
    monkeypatch.setattr(
        Planner, "orders", lambda self, output: edit(self, output, orders(self, output))
    )


def _scores_of_an_earlier_owner_are_added_to(monkeypatch):
    def edit(planner, output, orders):
        starts = dict(zip(output.num_scheduled_tokens, orders.starts, strict=True))
        orders.scored[:] = [
            chunk._replace(num_accumulated=starts[chunk.req_id]) for chunk in orders.scored
        ]
        return orders

    _message_edited(monkeypatch, edit)


def _preempted_request_hits_its_own_prompt(monkeypatch):
    admit = Planner.admit

    def forgetful(self, request):
        if request.request_id in self.requests:
            self.requests[request.request_id].first_hit = None
        return admit(self, request)

    monkeypatch.setattr(Planner, "admit", forgetful)


def _preempted_request_scores_more_than_at_first(monkeypatch):
    monkeypatch.setattr(
        TrackedRequest,
        "first_scored_query",
        property(lambda self: max(self._first_scored_query, self.num_cached)),
    )


def _chunks_look_like_decoding(monkeypatch):
    monkeypatch.setattr(Planner, "_unlike_decoding", lambda self, remaining, wanted: wanted)


def _private_score_pages_are_shared(monkeypatch):
    def deal_none(self, tracked):
        tracked.score_pages = [[]]
        return True

    monkeypatch.setattr(Dealer, "deal_pages", deal_none)


def _row_is_dealt_twice(monkeypatch):
    take = Pool.take

    def take_and_keep(self, count):
        items = take(self, count)
        # Rows are numbered from 0 on, pages behind the blocks.
        if items and items[0] < 2:
            self._free.append(items[0])
        return items

    monkeypatch.setattr(Pool, "take", take_and_keep)


def _message_is_dropped(monkeypatch):
    _message_edited(
        monkeypatch, lambda planner, output, orders: None if orders.step == 30 else orders
    )


def _message_is_for_another_step(monkeypatch):
    kept = {}

    def edit(planner, output, orders):
        kept[planner, orders.step] = orders
        return kept[planner, 29] if orders.step == 30 else orders

    _message_edited(monkeypatch, edit)


def _compaction_is_lost(monkeypatch):
    def edit(planner, output, orders):
        if orders.step > 20:
            orders.compactions.clear()
        return orders

    _message_edited(monkeypatch, edit)


def _worker_compacts_twice(monkeypatch):
    def edit(planner, output, orders):
        orders.compactions.extend(orders.compactions[:1])
        return orders

    _message_edited(monkeypatch, edit)


@pytest.mark.parametrize(
    "plant",
    [
        _freed_one_step_early,
        _hit_ends_a_block_too_late,
        _compressed_columns_are_hashed,
        _worker_state_survives_a_preemption,
        _chunk_runs_across_a_compaction,
        _scores_of_an_earlier_owner_are_added_to,
        _preempted_request_hits_its_own_prompt,
        _preempted_request_scores_more_than_at_first,
        _chunks_look_like_decoding,
        _private_score_pages_are_shared,
        _row_is_dealt_twice,
        _message_is_dropped,
        _message_is_for_another_step,
        _compaction_is_lost,
        _worker_compacts_twice,
    ],
    ids=lambda plant: plant.__name__.strip("_"),
)
def test_planted_bug_is_caught(plant, monkeypatch):
    """A test of the test: the simulator notices each of these."""
    plant(monkeypatch)
    with pytest.raises((AssertionError, StepRefused)):
        busy_runs()
