# SPDX-License-Identifier: Apache-2.0
"""I3 by simulation: no leak, no double free, no shared write, no block handed out too early."""

import pytest
from engine.build_scheduler import specs_of
from engine.busy_run import ALL_LEVELS, BASE, MODES, SETTINGS, busy_run, modes_of
from engine.levels import LEVELS
from engine.simulator import Simulator
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

# The longest prompts and answers below, together.
LONGEST = 120
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
            [("ems", "all"), ("ems", 12), ("ems", 6), ("ems", 1), ("snapkv", 6), ("knorm", 6)]
        ),
        levels=st.sampled_from(list(ALL_LEVELS.values())),
    )
    def start(self, mode, recompress_interval, num_blocks, max_num_batched_tokens, method, levels):
        recipe, global_queries = method
        if "prefill_interval" in levels and mode == "drafts":
            mode = "sync"
        self.compression = {
            **SETTINGS,
            "recipe": recipe,
            "global_queries": global_queries,
            "recompress_interval": recompress_interval,
            **levels,
        }
        self.options = {"max_num_batched_tokens": max_num_batched_tokens}
        self.simulator = Simulator(
            self.compression,
            num_blocks=num_blocks * len(specs_of(self.compression)),
            async_scheduling=mode == "async",
            num_drafts=3 if mode == "drafts" else 0,
            **self.options,
        )
        self.asked = {}

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 30), extra_args=REQUEST_SETTINGS)
    def arrive(self, prompt, max_tokens, extra_args):
        req_id = self.simulator.add(prompt, max_tokens, extra_args)
        self.asked[req_id] = (prompt, max_tokens, extra_args)

    @precondition(lambda self: self.simulator.answers)
    @rule(index=st.integers(0, 7), own=st.lists(st.integers(0, 3), min_size=1, max_size=8))
    def follow_up(self, index, own):
        """A prompt that goes on from an answer, and hits what its request left in the cache."""
        answers = self.simulator.answers
        req_id = list(answers)[index % len(answers)]
        prompt = [*self.asked[req_id][0], *answers[req_id]][: LONGEST - 30 - len(own)]
        self.arrive([*prompt, *own], 30, None)

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
        answers = dict(self.simulator.answers)
        self.simulator.tell_of_the_end()
        for req_id, (prompt, max_tokens, extra_args) in self.asked.items():
            assert len(answers[req_id]) == max_tokens
            num_blocks = 80 * len(specs_of(self.compression))
            alone = Simulator(self.compression, num_blocks=num_blocks, **self.options)
            name = alone.add(prompt, max_tokens, extra_args)
            alone.drain()
            assert answers[req_id] == alone.answers[name], (req_id, prompt)


SchedulingMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20)
TestScheduling = SchedulingMachine.TestCase


MODE_NAMES = ["sync", "async", "drafts"]


@pytest.mark.parametrize(
    ("levels", "mode"),
    [
        pytest.param(levels, mode, id=f"{levels}-{MODE_NAMES[MODES.index(mode)]}")
        for levels in ALL_LEVELS
        for mode in modes_of(levels)
    ],
)
def test_busy_run_exercises_what_the_planted_bugs_break(levels, mode):
    simulator = busy_run(levels, **mode)
    worker = simulator.worker
    assert min(worker.num_compactions) + min(worker.num_late_compactions) > 30
    is_within = "prefill_interval" in ALL_LEVELS[levels]
    assert all((count > 20) == is_within for count in worker.num_within_prompts)
    if len(simulator.managers) > 1:
        assert min(worker.num_late_compactions) > 0
    assert sum(hit > 0 for hit in worker.first_hits.values()) > 20
    assert simulator.num_preemptions >= 6
    assert worker.cache.num_checked_slots > 10_000
    assert (worker.num_accepted_drafts > 100) == ("num_drafts" in mode)
    if worker.kept is not None:
        decided = [count for of_group in worker.decided.values() for count in of_group.values()]
        assert len(set(decided)) > 2
    if worker.heads is not None:
        assert worker.heads.num_checked_rows > 4_000
        assert all(group.num_unequal > 50 for group in worker.heads.groups)


@pytest.mark.parametrize(
    ("levels", "count", "longest", "num_blocks"),
    [("alike", 200, 3000, 2000), ("pyramid of 3", 60, 1000, 1500)],
)
def test_many_requests_at_once(levels, count, longest, num_blocks):
    """Long and short ones, shared prefixes, a pool that preempts: each answers as it does alone."""
    settings = {
        **SETTINGS,
        "recent_window": 32,
        "recompress_interval": 32,
        "prefix_score_tokens": 4096,
        "query_ring_rows": 16,
        **LEVELS[levels],
        "budget": 64,
    }
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "async_scheduling": True}
    # From 10 tokens on, each step the same factor; every other one begins like the others.
    lengths = [round(10 * (longest / 10) ** (index / (count - 1))) for index in range(count)]
    prompts = [
        [*(range(length // 2) if index % 2 else ()), *range(10**6 + index, 10**6 + index + length)]
        for index, length in enumerate(lengths)
    ]
    simulator = Simulator(settings, num_blocks=num_blocks, **options)
    names = [simulator.add(prompt, 40) for prompt in prompts]
    for index, name in enumerate(names):
        simulator.step()
        if index % 5 == 4:
            simulator.abort(name)
    simulator.drain(limit=50_000)
    assert simulator.num_preemptions > 0
    assert min(simulator.worker.num_compactions) > 0.7 * count
    assert simulator.pool.get_num_free_blocks() == num_blocks - 1
    # The same, one after the other.
    alone = Simulator(settings, num_blocks=num_blocks, **options)
    for index in range(0, count, 10):
        assert len(simulator.answers[names[index]]) == 40
        name = alone.add(prompts[index], 40)
        alone.drain()
        assert alone.answers[name] == simulator.answers[names[index]]


def test_columns_generated_beside_compressed_ones_are_not_shared():
    """A level that was never compressed attended, through the others, to what was."""
    settings = {**SETTINGS, **LEVELS["one whole"], "min_blocks_saved": 4, "recompress_interval": 4}
    simulator = Simulator(settings, num_blocks=200)
    prompt = BASE[:24]
    first = simulator.add(prompt, 22)
    simulator.drain()
    # The level that keeps least was compressed after 40 tokens, the other one would be after 48.
    assert simulator.worker.num_late_compactions == [0, 1]
    longer = [*prompt, *simulator.answers[first][:20], *range(100, 110)]
    for _ in range(2):
        # The second one finds more in the cache than the first request may leave: its prompt.
        simulator.add(longer, 4, {"kv_compression": "off"})
        simulator.drain()
    assert list(simulator.worker.first_hits.values()) == [0, 24, 52]


def test_requests_of_two_frontends_are_told_of_their_last_step():
    """In which both of them are compressed, and end."""
    simulator = Simulator(SETTINGS, num_blocks=200, max_num_batched_tokens=256)
    for token in (1, 2):
        simulator.add([token] * 60, max_tokens=2)
    simulator.drain()
    assert [told.num_compactions for told in simulator.told.values()] == [1, 1]
