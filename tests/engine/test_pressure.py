# SPDX-License-Identifier: Apache-2.0
"""Compression for when the pool has no room for everything: when it is, and that it stays exact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engine.busy_run import BASE, MODES, SETTINGS
from engine.harness import LLAMA, engine, tokens
from engine.simulator import Simulator

from ems_vllm.engine.scheduler.pressure import Pressure

EMS = {"recipe": "ems", "budget": 64, "recent_window": 32, "min_blocks_saved": 1}
UNDER_PRESSURE = {**EMS, "when": "pressure"}


def waiting(prompt_len: int, max_tokens: int = 10_000) -> SimpleNamespace:
    return SimpleNamespace(
        num_prompt_tokens=prompt_len, num_tokens=prompt_len, max_tokens=max_tokens
    )


def pressure(num_blocks: int, *requests: SimpleNamespace, usage: float = 1.0) -> Pressure:
    """Of requests that all wait, dense, in a pool with a block for each 16 tokens."""
    return Pressure(
        num_blocks, usage, lambda _, num_tokens: -(-num_tokens // 16), list, lambda: requests
    )


class TestPressure:
    def test_a_request_that_fits_with_its_answer_is_not_too_much(self):
        one = waiting(1600, max_tokens=160)
        assert not pressure(110, one).is_high(one)
        assert pressure(109, one).is_high(one)

    def test_it_counts_where_it_is_in_no_queue_yet(self):
        one = waiting(1600, max_tokens=160)
        assert pressure(109).is_high(one)

    def test_all_that_wait_count(self):
        requests = [waiting(1600, max_tokens=160) for _ in range(3)]
        assert not pressure(330, *requests).is_high(requests[0])
        assert pressure(329, *requests).is_high(requests[0])

    def test_less_than_the_whole_pool_may_be_allowed(self):
        one = waiting(1600, max_tokens=160)
        assert pressure(110, one, usage=0.5).is_high(one)
        assert not pressure(220, one, usage=0.5).is_high(one)

    def test_answers_are_taken_to_be_as_long_as_they_have_been(self):
        one = waiting(1600)
        found = pressure(120, one)
        assert not found.is_high(one)
        for _ in range(200):
            found.ended(SimpleNamespace(num_prompt_tokens=100, num_tokens=1100))
        assert found.is_high(one)


PROMPTS = [tokens(length, seed=length) for length in (700, 500, 400)]


@pytest.fixture(scope="module")
def dense_answers():
    with engine(None, LLAMA, max_model_len=2048) as dense:
        return dense.generate(PROMPTS, 40)


@pytest.fixture(scope="module")
def probe(dense_answers):
    """One engine of a process at a time."""
    with engine(UNDER_PRESSURE, LLAMA, max_model_len=2048) as running:
        yield running


def compactions(probe, prompts, **sampling):
    probe.llm.reset_prefix_cache()
    outputs = probe.generate_outputs(prompts, 40, **sampling)
    return [output.outputs[0].kv_compression.num_compactions for output in outputs]


@pytest.mark.slow
class TestEngine:
    def test_with_room_for_all_nothing_is_compressed_and_answers_are_those_of_vllm(
        self, probe, dense_answers
    ):
        assert compactions(probe, PROMPTS) == [0, 0, 0]
        probe.llm.reset_prefix_cache()
        assert probe.generate(PROMPTS, 40) == dense_answers

    def test_a_request_that_asks_for_it_is_compressed_all_the_same(self, probe):
        prompt = [tokens(700, seed=1)]
        for wish in ({"kv_compression": "on"}, {"kv_budget": 32}, {"kv_ratio": 0.1}):
            assert compactions(probe, prompt, extra_args=wish)[0] > 0, wish
        assert compactions(probe, prompt, extra_args={"kv_compression": "off"}) == [0]

    def test_requests_that_were_left_alone_are_counted(self, probe):
        accounts = probe.scheduler.planner.accounts
        accounts.take_totals()
        compactions(probe, [tokens(700, seed=3), tokens(20, seed=4)])
        found = accounts.take_totals().num_ended
        assert found == {"ample": 2}


@pytest.mark.slow
class TestSmallPool:
    @pytest.mark.parametrize(("num_blocks", "least", "most"), [(190, 1, 3), (110, 3, 4)])
    def test_only_as_many_are_compressed_as_it_takes(self, num_blocks, least, most):
        """Each would hold 43 blocks."""
        prompts = [tokens(640, seed=seed) for seed in range(4)]
        with engine(UNDER_PRESSURE, LLAMA, max_model_len=1024, num_blocks=num_blocks) as small:
            found = compactions(small, prompts)
        assert least <= sum(count > 0 for count in found) <= most

    def test_what_is_preempted_is_compressed_when_it_comes_again(self):
        """Two fit, by the estimate, and grow beyond the pool."""
        settings = {**UNDER_PRESSURE, "pressure_usage": 1.0}
        prompts = [tokens(400, seed=seed) for seed in range(2)]
        with engine(settings, LLAMA, max_model_len=1400, num_blocks=100) as small:
            outputs = small.generate_outputs(prompts, 900)
            assert small.num_preemptions > 0
        held = [output.outputs[0].kv_compression for output in outputs]
        assert any(one.num_compactions > 0 for one in held)
        assert all(one.num_tokens == 1300 for one in held)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: next(iter(mode), "sync"))
@pytest.mark.parametrize("usage", [0.8, 1.0])
def test_block_accounts_balance_whatever_the_load_decides(mode, usage):
    """The simulated worker compares every slot with what must be there."""
    settings = {**SETTINGS, "global_queries": 12, "when": "pressure", "pressure_usage": usage}
    simulator = Simulator(settings, num_blocks=60, **mode)
    for round_ in range(6):
        for index in range(5):
            simulator.add([*BASE[: 10 * index + 5], 200 + index, 300 + round_ % 2], 12 + 6 * index)
        for _ in range(25 // (1 + mode.get("num_drafts", 0))):
            if simulator.unfinished:
                simulator.step()
        simulator.preempt(round_)
    simulator.drain()
    ended = simulator.totals.num_ended
    assert ended["compressed"] > 0
    assert ended["ample"] > 0
    assert simulator.num_preemptions > 0
