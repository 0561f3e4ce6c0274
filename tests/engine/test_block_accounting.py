# SPDX-License-Identifier: Apache-2.0
"""I3 by simulation: no leak, no double free, no shared write, no block handed out too early."""

import pytest
from engine.simulator import Simulator, SymbolicWorker
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ems_vllm.engine.compaction_ledger import CompactionLedger
from ems_vllm.engine.kv_cache_manager import CompressedAttentionManager

SETTINGS = {
    "recipe": "ems",
    "budget": 8,
    "recent_window": 4,
    "obs_window": 2,
    "recompress_interval": 8,
    "min_blocks_saved": 1,
    "prefix_score_tokens": 48,
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
        async_scheduling=st.booleans(),
        recompress_interval=st.sampled_from([0, 4, 8]),
        num_blocks=st.sampled_from([32, 48, 80]),
        max_num_batched_tokens=st.sampled_from([8, 24, 64]),
        recipe=st.sampled_from(["ems", "knorm"]),
    )
    def start(
        self, async_scheduling, recompress_interval, num_blocks, max_num_batched_tokens, recipe
    ):
        self.compression = {
            **SETTINGS,
            "recipe": recipe,
            "recompress_interval": recompress_interval,
        }
        self.options = {"max_num_batched_tokens": max_num_batched_tokens}
        self.simulator = Simulator(
            self.compression,
            num_blocks=num_blocks,
            async_scheduling=async_scheduling,
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

    @rule()
    def reset_prefix_cache(self):
        self.simulator.scheduler.reset_prefix_cache()

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


def busy_run(**options):
    """A fixed load in which everything happens: hits, preemptions, recompressions, late ones."""
    simulator = Simulator({**SETTINGS, "recipe": "knorm"}, num_blocks=40, **options)
    for round_ in range(6):
        for index in range(5):
            prompt = [*BASE[: 10 * index + 5], 200 + index, 300 + round_ % 2]
            simulator.add(prompt, 12 + 6 * index)
        for _ in range(25):
            if simulator.unfinished:
                simulator.step()
        simulator.preempt(round_)
    simulator.drain()
    return simulator


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_busy_run_exercises_what_the_planted_bugs_break(async_scheduling):
    simulator = busy_run(async_scheduling=async_scheduling)
    assert simulator.worker.num_compactions > 30
    assert simulator.num_preemptions > 6
    assert simulator.worker.num_checked_slots > 10_000


def _freed_one_step_early(monkeypatch):
    # The obvious rule: what the plan says for the tokens processed so far. The step that compacts
    # has not run then, it is just being scheduled.
    monkeypatch.setattr(
        CompactionLedger, "columns_to_free", lambda self, processed: self.plan.columns(processed)[0]
    )


def _hit_runs_into_the_targets(monkeypatch):
    admit = CompressedAttentionManager.admit
    monkeypatch.setattr(
        CompressedAttentionManager,
        "admit",
        lambda self, request: None if admit(self, request) is None else 10**9,
    )
    monkeypatch.setattr(
        CompressedAttentionManager,
        "cache_blocks",
        super(CompressedAttentionManager, CompressedAttentionManager).cache_blocks,
    )


def _compressed_columns_are_hashed(monkeypatch):
    monkeypatch.setattr(
        CompressedAttentionManager,
        "cache_blocks",
        super(CompressedAttentionManager, CompressedAttentionManager).cache_blocks,
    )


def _worker_state_survives_a_preemption(monkeypatch):
    admit = SymbolicWorker._admit

    def keeping(self, request):
        old = self.kept.get(request.info.req_id)
        admit(self, request)
        if old is not None:
            self.states[request.info.req_id].first = old.first
            self.states[request.info.req_id].tail = old.tail
        self.kept[request.info.req_id] = self.states[request.info.req_id]

    monkeypatch.setattr(SymbolicWorker, "kept", {}, raising=False)
    monkeypatch.setattr(SymbolicWorker, "_admit", keeping)


def _chunk_runs_across_a_compaction(monkeypatch):
    monkeypatch.setattr(CompressedAttentionManager, "chunk_limit", lambda *args: 10**9)


def busy_runs():
    for async_scheduling in (False, True):
        busy_run(async_scheduling=async_scheduling)


@pytest.mark.parametrize(
    "plant",
    [
        _freed_one_step_early,
        _hit_runs_into_the_targets,
        _compressed_columns_are_hashed,
        _worker_state_survives_a_preemption,
        _chunk_runs_across_a_compaction,
    ],
    ids=lambda plant: plant.__name__.strip("_"),
)
def test_planted_bug_is_caught(plant, monkeypatch):
    """A test of the test: the simulator notices each of these."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        busy_runs()
