# SPDX-License-Identifier: Apache-2.0
"""The guard: which requests it measures, how it judges, and what comes of it in an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
from engine.harness import LLAMA, engine, tokens
from engine.unequal_budgets import few_blocks

from ems_vllm.confidence import upper_bound
from ems_vllm.config.guard import GuardSettings
from ems_vllm.engine.report import AttentionError
from ems_vllm.engine.scheduler import guard as guards
from ems_vllm.engine.scheduler.guard import Guard
from ems_vllm.engine.totals import Totals

SETTINGS = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
    "guard_share": 1.0,
}
LIMIT = 0.2


def guard(share=0.5, limit=LIMIT, action="report", tolerance=0.05):
    return Guard(GuardSettings(share, limit, action, tolerance))


def totals_of(one):
    totals = Totals()
    one.count(totals)
    return totals


def run(one, *errors, req_id="a"):
    """A request that was compacted so often."""
    for mean in errors:
        one.ordered(req_id)
        one.measured([AttentionError(req_id, mean, 2 * mean)])
    one.ended(req_id)


class TestSampling:
    @pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
    def test_as_many_are_measured_as_asked(self, share):
        count = sum(guard(share).measures(f"request-{n}") for n in range(20_000))
        assert count == pytest.approx(20_000 * share, rel=0.15)

    def test_the_same_ones_wherever_it_is_asked(self):
        ids = [f"request-{n}" for n in range(100)]
        chosen = [list(map(guard(0.5).measures, ids)) for _ in range(2)]
        assert chosen[0] == chosen[1]
        assert set(chosen[0]) == {False, True}


class TestJudging:
    def test_a_request_is_judged_once_by_its_worst_compaction(self):
        one = guard()
        run(one, 0.1, 0.3, 0.05)
        found = totals_of(one)
        assert found.attention_errors == [(0.3, 0.6)]
        assert (found.num_guarded, found.num_diverged) == (1, 1)
        assert totals_of(one).num_guarded == 0

    def test_what_comes_late_is_waited_for(self):
        one = guard()
        one.ordered("a")
        one.ordered("a")
        one.measured([AttentionError("a", 0.1, 0.1)])
        one.ended("a")
        assert totals_of(one).num_guarded == 0
        one.measured([AttentionError("a", 0.4, 0.5)])
        assert totals_of(one).attention_errors == [(0.4, 0.5)]

    def test_a_preempted_request_counts_once(self):
        """Its compactions are ordered and measured again."""
        one = guard()
        for _ in range(2):
            one.ordered("a")
            one.measured([AttentionError("a", 0.1, 0.2)])
        one.ended("a")
        assert totals_of(one).attention_errors == [(0.1, 0.2)]

    def test_a_request_that_was_not_compacted_does_not_count(self):
        one = guard()
        one.ended("a")
        assert totals_of(one).num_guarded == 0

    def test_measurements_that_never_come_do_not_pile_up(self, monkeypatch):
        monkeypatch.setattr(guards, "_MOST_LEAVING", 3)
        one = guard()
        for n in range(10):
            one.ordered(str(n))
            one.ended(str(n))
        assert len(one._leaving) == 3
        one.measured([AttentionError("9", 0.1, 0.2)])
        assert totals_of(one).num_guarded == 1

    def test_bounds_are_of_the_latest(self):
        one = guard()
        assert totals_of(one).diverged_upper_bound is None
        run(one, 0.9)
        for _ in range(58):
            run(one, 0.1)
        found = totals_of(one)
        assert found.diverged_upper_bound == upper_bound(1, 59, 0.95)
        assert 0 < found.diverged_lower_bound < 1 / 59 < found.diverged_upper_bound
        for _ in range(guards.WINDOW):
            run(one, 0.1)
        assert totals_of(one).diverged_upper_bound == upper_bound(0, guards.WINDOW, 0.95)

    def test_without_a_limit_nobody_diverges(self):
        one = guard(limit=None)
        run(one, 0.9)
        found = totals_of(one)
        assert (found.num_guarded, found.num_diverged) == (1, 0)
        assert found.diverged_upper_bound is None
        assert found.guard_dense is None


class TestDense:
    def test_it_begins_when_it_is_sure_and_ends_when_the_share_has_fallen(self):
        one = guard(share=0.5, action="dense", tolerance=0.05)
        chosen = {one.measures(f"r{n}"): f"r{n}" for n in range(50)}
        run(one, 0.9)
        # One of one: the share is 5 % at least.
        assert not one.keeps_whole(chosen[False])
        run(one, 0.9)
        assert one.keeps_whole(chosen[False])
        assert not one.keeps_whole(chosen[True])
        assert totals_of(one).guard_dense
        for _ in range(37):
            run(one, 0.1)
        # 2 of 39 are more than 5 %, of 40 they are not.
        assert one.keeps_whole(chosen[False])
        run(one, 0.1)
        assert not one.keeps_whole(chosen[False])
        assert totals_of(one).guard_dense is False

    def test_a_report_never_goes_dense(self):
        one = guard(action="report")
        for _ in range(20):
            run(one, 0.9)
        assert not any(one.keeps_whole(f"r{n}") for n in range(50))


PROMPTS = [tokens(length, seed=length) for length in (420, 380, 130, 60)]


@contextmanager
def measuring(probe, is_measured: bool) -> Iterator[None]:
    """Whether the requests of an engine are measured, whatever their ids."""
    with mock.patch.object(probe.scheduler.planner._guard, "measures", return_value=is_measured):
        yield


def totals_while(probe, prompts=PROMPTS, num_tokens=100, **sampling):
    """Totals of an engine, of these prompts alone; and their answers, as tokens."""
    accounts = probe.scheduler.planner.accounts
    probe.llm.reset_prefix_cache()
    accounts.take_totals()
    answers = probe.generate(prompts, num_tokens, **sampling)
    return accounts.take_totals(), answers


KINDS = {
    "one level": SETTINGS,
    "two levels": {**SETTINGS, "allocator": {"name": "pyramid", "beta": 4, "num_levels": 2}},
    "by head": {**SETTINGS, "allocator": {"name": "ada"}},
    "coverage": {**SETTINGS, "budget": 128, "coverage": 0.12, "min_budget": 16},
    "as it comes": {**SETTINGS, "prefill_interval": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_every_request_is_measured_and_answers_as_if_it_were_not(settings):
    with engine(settings, LLAMA, max_model_len=2048) as probe:
        with measuring(probe, False):
            plain, expected = totals_while(probe)
        found, answers = totals_while(probe)
        with measuring(probe, True), few_blocks(probe, 34 * len(probe.managers)):
            preempted, _ = totals_while(probe)
        is_preempted = probe.num_preemptions > 0
    assert answers == expected
    assert plain.num_guarded == 0
    assert plain.attention_errors == []
    assert found.num_guarded == found.num_ended["compressed"] > 1
    assert all(0.01 < mean < worst < 10 for mean, worst in found.attention_errors)
    # Nothing is judged without a limit.
    assert found.num_diverged == 0
    assert is_preempted
    again = [sorted(each.attention_errors) for each in (found, preempted)]
    assert again[1] == [pytest.approx(pair, rel=1e-4) for pair in again[0]]


@pytest.mark.slow
def test_requests_keep_their_whole_cache_while_too_many_diverge():
    settings = {
        **SETTINGS,
        "guard_share": 0.5,
        "guard_limit": 0.001,
        "guard_action": "dense",
        "guard_tolerance": 0.4,
    }
    short = [tokens(200, seed=seed) for seed in range(6)]
    with engine(settings, LLAMA, max_model_len=2048) as probe:
        # Of four that all diverge, more than 40 % do.
        with measuring(probe, True):
            all_of_them, _ = totals_while(probe, short[:4], 2)
        with measuring(probe, False):
            spared, _ = totals_while(probe, short[:2], 2)
            asked, _ = totals_while(probe, short[:1], 2, extra_args={"kv_budget": 64})
            off, _ = totals_while(probe, short[:1], 2, extra_args={"kv_compression": "off"})
        judge = probe.scheduler.planner._guard
        judge._settings = replace(judge._settings, limit=5.0)
        with measuring(probe, True):
            recovered, _ = totals_while(probe, short, 2)
        with measuring(probe, False):
            compressed, _ = totals_while(probe, short[:2], 2)
    assert all_of_them.num_ended == {"compressed": 4}
    assert all_of_them.num_diverged == 4
    assert all_of_them.guard_dense
    assert spared.num_ended == {"spared": 2}
    assert asked.num_ended == {"compressed": 1}
    assert off.num_ended == {"off": 1}
    assert recovered.num_guarded == 6
    assert recovered.num_diverged == 0
    assert recovered.guard_dense is False
    assert compressed.num_ended == {"compressed": 2}


@pytest.mark.slow
def test_keeping_more_changes_less():
    errors = []
    with engine({**SETTINGS, "max_budget": 256}, LLAMA, max_model_len=2048) as probe:
        for budget in (32, 128, 256):
            found, _ = totals_while(probe, PROMPTS[:1], 2, extra_args={"kv_budget": budget})
            errors += [mean for mean, _ in found.attention_errors]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)
