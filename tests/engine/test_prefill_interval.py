# SPDX-License-Identifier: Apache-2.0
"""Prompts that are compressed while they are still processed: bounded, and all promises hold."""

from __future__ import annotations

from typing import Any

import pytest
from engine.block_guard import guarded
from engine.harness import BLOCK_SIZE, LLAMA, engine, tokens
from engine.one_engine import cold as cold
from engine.one_engine import compression as compression
from engine.one_engine import fresh as fresh
from engine.one_engine import plain_answers as plain_answers
from engine.one_engine import probe as probe
from engine.unequal_budgets import (
    COMPRESSION,
    LONG,
    OPTIONS,
    SHORT,
    answers_of_transformers,
    disturbed,
    few_blocks,
    found_by_runner_v2,
    group_stats,
    identity_prompts,
    increase,
    start_log,
)
from engine.workers import answers_of_workers

from ems_vllm.config import ConfigError, RequestOptions, load_config

pytestmark = pytest.mark.slow

INTERVAL = 48
EMS = {**COMPRESSION, "prefill_interval": INTERVAL}
LEVELS = {**EMS, "allocator": {"name": "pyramid", "beta": 4, "num_levels": 2}}
# Every query scores, and what was kept carries the scores of those before.
ALL_QUERIES = {**EMS, "recipe": "h2o", "global_queries": "all"}
COMPRESSIONS = {
    "ems": EMS,
    "two levels": LEVELS,
    "all queries": ALL_QUERIES,
}
# A pool for two requests or so, and a prompt of many times as much.
POOL_BLOCKS = 36
ENDLESS = tokens(2400, seed=17)
BOUNDED = {**EMS, "max_budget": None, "allow_off": False}


def compactions_of_prompt(compression: dict[str, Any], prompt_len: int) -> int:
    settings = load_config(compression).plan_settings
    return settings.plan(prompt_len, BLOCK_SIZE, RequestOptions()).num_within_prompt + 1


SYNC, ASYNC = {"async_scheduling": False}, {"async_scheduling": True}


@pytest.fixture(
    scope="class",
    params=[(EMS, SYNC), (LEVELS, ASYNC)],
    ids=["one level, sync", "two levels, async"],
)
def case(request):
    return request.param


class TestWithinPrompts:
    """One engine for all of it."""

    def test_a_budget_that_holds_everything_is_identical_to_plain_vllm(self, fresh, plain_answers):
        before = group_stats(fresh)
        assert fresh.generate(identity_prompts(), 20, {"kv_budget": 4096}) == plain_answers
        assert not any(increase(fresh, before, "num_compactions"))

    def test_a_prompt_is_compressed_as_it_comes(self, fresh, compression):
        before = group_stats(fresh)
        fresh.generate([LONG], 2)
        expected = compactions_of_prompt(EMS, len(LONG))
        assert expected > 5
        found = increase(fresh, before, "num_compactions")
        # Levels go by the budget of the one that keeps most, so there are fewer.
        assert found == [expected] if compression is EMS else 3 < min(found) == max(found)

    def test_hits_chunks_and_preemptions_change_no_answer(self, fresh, cold, compression):
        assert load_config(compression).is_neutral_to_hits
        found = disturbed(fresh)
        assert {name: found[name] == cold for name in found} == dict.fromkeys(found, True)

    def test_a_pool_that_is_too_small_changes_no_answer(self, fresh):
        prompts = [tokens(length, seed=length) for length in (420, 380, 130, 60)]
        expected = fresh.generate(prompts, 70)
        before = fresh.num_preemptions
        with few_blocks(fresh, 26 * len(group_stats(fresh))):
            assert fresh.generate(prompts, 70) == expected
        assert fresh.num_preemptions > before

    def test_hits_end_where_the_first_compaction_writes(self, fresh):
        first, again = (fresh.generate_outputs([LONG], 2)[0].num_cached_tokens for _ in range(2))
        assert first == 0
        shared = {plan.max_shared_tokens for plan in plans_of(fresh, len(LONG))}
        assert again == min(shared) < len(LONG) // 4

    def test_the_start_log_says_what_a_prompt_holds(self, probe, compression):
        (line,) = (line for line in start_log(probe, compression, 1280) if "as they come" in line)
        assert f"every {INTERVAL} tokens" in line


def plans_of(probe, prompt_len: int):
    return [
        manager.kv_cache_spec.settings.plan(prompt_len, BLOCK_SIZE, RequestOptions())
        for manager in probe.managers
    ]


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_answers_are_those_on_transformers(name):
    compression = COMPRESSIONS[name]
    with engine(compression, LLAMA, **OPTIONS) as probe:
        found = [probe.generate([prompt], 80)[0] for prompt in (LONG, SHORT)]
        assert min(group["num_compactions"] for group in group_stats(probe)) > 5
    assert found == answers_of_transformers(compression, [LONG, SHORT], 80)


def test_a_prompt_of_several_pools_is_served():
    options = {"max_model_len": 2560, "num_blocks": POOL_BLOCKS, "async_scheduling": True}
    with engine(BOUNDED, LLAMA, max_num_batched_tokens=64, **options) as probe, guarded(probe):
        assert len(ENDLESS) > 4 * probe.pool.num_gpu_blocks * BLOCK_SIZE
        alone = probe.generate([ENDLESS], 12)
        assert probe.stats()["num_compactions"] >= compactions_of_prompt(BOUNDED, len(ENDLESS))
        (plan,) = plans_of(probe, len(ENDLESS))
        most = plan.max_replay_columns(len(ENDLESS) + 12)
        assert max(live for _, live, _ in probe.live_columns) <= most < POOL_BLOCKS
        # Beside others, some of which are preempted for it or it for them.
        others = [tokens(length, seed=length) for length in (300, 500, 150)]
        expected = [probe.generate([prompt], 40)[0] for prompt in others]
        assert probe.generate([ENDLESS, *others], [12, 40, 40, 40]) == [*alone, *expected]
        probe.assert_pool_is_empty()
    with engine(BOUNDED, LLAMA, max_model_len=2560, async_scheduling=False) as probe:
        # The pool has nothing to do with it, nor the steps that are in flight.
        assert probe.generate([ENDLESS], 12) == alone


def test_without_the_interval_such_a_pool_is_refused():
    # vLLM's own sentence: it asks the spec for what a request holds at most.
    for settings in (
        {**BOUNDED, "prefill_interval": 0},
        # A request that may switch compression off may hold its whole length.
        {**BOUNDED, "allow_off": True},
    ):
        with (
            pytest.raises(ValueError, match=r"max seq len"),
            engine(settings, LLAMA, max_model_len=2560, num_blocks=POOL_BLOCKS),
        ):
            pass


def test_the_second_model_runner_answers_alike():
    lengths = (130, 306)
    found = found_by_runner_v2(EMS, lengths)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    with engine(EMS, LLAMA, **OPTIONS) as probe:
        prompts = [tokens(length, seed=length) for length in lengths]
        assert probe.generate(prompts, 20) == found["answers"]
        assert [group["num_compactions"] for group in group_stats(probe)] == found["compactions"]


@pytest.mark.parametrize(
    ("parallel", "environment"),
    [
        ({"pipeline_parallel_size": 2}, {"VLLM_PP_LAYER_PARTITION": "1,3"}),
        ({"tensor_parallel_size": 2}, {}),
    ],
    ids=["pipeline", "tensor"],
)
def test_two_workers_answer_as_one(parallel, environment):
    with engine(LEVELS, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([LONG, SHORT], 30)
    found = answers_of_workers(LLAMA, LEVELS, parallel, [LONG, SHORT], 30, environment)
    assert found.answers == expected
    for rank in found.stats:
        assert all(group["num_compactions"] > 4 for group in rank)


def test_heads_of_different_numbers_of_entries_are_refused():
    with pytest.raises(ConfigError, match=r"prefill_interval=48 .*allocator='ada'.* set it to 0"):
        load_config({**EMS, "allocator": "ada"})


def test_an_interval_shorter_than_the_window_that_scores_is_refused():
    with pytest.raises(ConfigError, match=r"prefill_interval=8 .* obs_window=16"):
        load_config({**EMS, "prefill_interval": 8})
