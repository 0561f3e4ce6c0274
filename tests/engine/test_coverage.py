# SPDX-License-Identifier: Apache-2.0
"""Requests that keep what a coverage says: what is not needed goes back, and all promises hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from engine.harness import BLOCK_SIZE, LLAMA, ROOT, engine, tokens
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

from ems_vllm.config import RequestOptions
from ems_vllm.engine.scheduler.compaction_ledger import OrderedCompaction
from ems_vllm.engine.scheduler.planner import Planner
from ems_vllm.engine.worker.requests import StepRefused
from ems_vllm.policies import policy
from ems_vllm.policies.coverage import held_shares

pytestmark = pytest.mark.slow

# Of random weights no entry matters much: a third of the attention is on far fewer entries.
EMS = {**COMPRESSION, "budget": 96, "coverage": 0.3, "min_budget": 16}
LEVELS = {**EMS, "allocator": {"name": "pyramid", "beta": 4, "num_levels": 2}}
WITHIN_PROMPTS = {**EMS, "prefill_interval": 48}
SNAPKV = {**EMS, "recipe": "snapkv"}
KNORM = {**EMS, "recipe": "knorm", "coverage": 0.12}
COMPRESSIONS = {
    "ems": EMS,
    "two levels": LEVELS,
    "within prompts": WITHIN_PROMPTS,
    "snapkv": SNAPKV,
    "knorm": KNORM,
}


# What held_shares reads of a context, but for its layers.
_OF_SHARES = (
    "max_budget",
    "max_entries",
    "block_size",
    "num_rows",
    "num_kv_heads",
    "device",
    "is_entry",
)

EMS_TINY = str(ROOT / "models" / "ems-tiny")

SYNC, ASYNC = {"async_scheduling": False}, {"async_scheduling": True}


@pytest.fixture(
    scope="class",
    params=[(EMS, SYNC), (LEVELS, ASYNC), (WITHIN_PROMPTS, ASYNC)],
    ids=["one level, sync", "two levels, async", "within prompts, async"],
)
def case(request):
    return request.param


def plans_of(probe: Any) -> list[Any]:
    """Of LONG, by group."""
    return [
        manager.kv_cache_spec.settings.plan(len(LONG), BLOCK_SIZE, RequestOptions())
        for manager in probe.managers
    ]


class TestCovered:
    """One engine for all of it."""

    def test_a_budget_that_holds_everything_is_identical_to_plain_vllm(self, fresh, plain_answers):
        before = group_stats(fresh)
        assert fresh.generate(identity_prompts(), 20, {"kv_budget": 4096}) == plain_answers
        assert not any(increase(fresh, before, "num_compactions"))

    def test_less_than_the_budget_is_kept_and_the_rest_goes_back(self, fresh):
        before = group_stats(fresh)
        fresh.live_columns.clear()
        fresh.generate([LONG], 12)
        plan, *_ = plans_of(fresh)
        first, tail = plan.columns(len(LONG))
        kept = increase(fresh, before, "num_entries_kept")[0]
        assert kept < (tail - first) * BLOCK_SIZE * increase(fresh, before, "num_compactions")[0]
        _, live, processed = fresh.live_columns[-1]
        assert live < -(-processed // BLOCK_SIZE) - first

    def test_hits_chunks_and_preemptions_change_no_answer(self, fresh, cold):
        found = disturbed(fresh)
        assert {name: found[name] == cold for name in found} == dict.fromkeys(found, True)

    def test_a_pool_that_is_too_small_changes_no_answer(self, fresh):
        prompts = [tokens(length, seed=length) for length in (420, 380, 130, 60)]
        expected = fresh.generate(prompts, 70)
        before = fresh.num_preemptions
        with few_blocks(fresh, 34 * len(group_stats(fresh))):
            assert fresh.generate(prompts, 70) == expected
        assert fresh.num_preemptions > before

    def test_the_start_log_says_that_a_budget_is_the_most(self, probe, compression):
        (line,) = (line for line in start_log(probe, compression, 1280) if "coverage" in line)
        assert "30 %" in line
        assert "at least 16" in line


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_answers_are_those_on_transformers(name):
    compression = COMPRESSIONS[name]
    with engine(compression, LLAMA, **OPTIONS) as probe:
        found = [probe.generate([prompt], 80)[0] for prompt in (LONG, SHORT)]
        (stats, *_) = group_stats(probe)
    assert found == answers_of_transformers(compression, [LONG, SHORT], 80)
    assert stats["num_entries_kept"] < 96 * stats["num_compactions"]


def test_protected_tokens_stay_whatever_the_coverage():
    compression = {**EMS, "coverage": 0.05}
    with engine(compression, LLAMA, **OPTIONS) as probe:
        free, protected = None, {"kv_protect": ["100-150"]}
        for extra_args, kept in ((free, 16), (protected, 64)):
            before = group_stats(probe)
            found = probe.generate([LONG], 8, extra_args)
            # 50 protected entries and the sinks do not fit into three blocks.
            assert increase(probe, before, "num_entries_kept") == [kept]
    assert found == answers_of_transformers(compression, [LONG], 8, protected)


def test_a_group_too_large_for_the_workspace_decides_for_all_its_layers():
    with engine(EMS, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([LONG], 40)
        kept = group_stats(probe)[0]["num_entries_kept"]
        (group,) = probe.worker.compression.groups
        before = group_stats(probe)
        probe.llm.reset_prefix_cache()
        # One layer at a time.
        with mock.patch.object(group._compactor, "_workspace_bytes", 1):
            assert probe.generate([LONG], 40) == expected
        assert increase(probe, before, "num_entries_kept") == [kept]


def test_what_was_kept_once_is_kept_again():
    kept_from, found = OrderedCompaction.kept_from, []

    def noted(self, first):
        found.append(self.tail - first)
        kept_from(self, first)

    compression = {**EMS, "budget": 256, "coverage": 0.25}
    with (
        mock.patch.object(OrderedCompaction, "kept_from", noted),
        engine(compression, LLAMA, **OPTIONS) as probe,
    ):
        probe.generate([LONG], 300)
    assert len(found) > 4
    # A share of what is held would be ever less.
    assert found == sorted(found)


def test_the_second_model_runner_answers_alike():
    lengths = (130, 306)
    found = found_by_runner_v2(EMS, lengths)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    with engine(EMS, LLAMA, **OPTIONS) as probe:
        prompts = [tokens(length, seed=length) for length in lengths]
        assert probe.generate(prompts, 20) == found["answers"]
        assert [group["num_compactions"] for group in group_stats(probe)] == found["compactions"]


def test_ranks_decide_together():
    with engine(LEVELS, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([LONG, SHORT], 60)
        stats = group_stats(probe)
    found = answers_of_workers(LLAMA, LEVELS, {"tensor_parallel_size": 2}, [LONG, SHORT], 60)
    assert found.answers == expected
    for rank in found.stats:
        kept = [group["num_entries_kept"] for group in rank]
        assert kept == [group["num_entries_kept"] for group in stats]


def kept_by(stats: list[dict[str, int]]) -> list[int]:
    return [group["num_entries_kept"] for group in stats]


def test_stages_that_have_levels_of_their_own_decide_for_these():
    with engine(LEVELS, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([LONG, SHORT], 60)
        one, other = kept_by(group_stats(probe))
    found = answers_of_workers(LLAMA, LEVELS, {"pipeline_parallel_size": 2}, [LONG, SHORT], 60)
    assert found.answers == expected
    assert [kept_by(stage) for stage in found.stats] == [[one], [other]]


def test_the_first_stage_of_a_level_decides_for_the_others():
    """As one process does in which the layers of the first stage decide."""

    def of_first_layer(context, ranked, compared):
        first = SimpleNamespace(
            num_layers=1,
            is_eligible=context.is_eligible[:1],
            **{name: getattr(context, name) for name in _OF_SHARES},
        )
        return held_shares(first, ranked, compared)

    # Its layers attend unlike each other.
    compression = {**EMS, "budget": 128, "coverage": 0.4}
    with engine(compression, EMS_TINY, **OPTIONS) as probe:
        probe.generate([LONG, SHORT], 60)
        kept_by_all = kept_by(group_stats(probe))
        (group,) = probe.worker.compression.groups
        group._compactor._covering._num_heads //= len(group.layer_names)
        before = group_stats(probe)
        with mock.patch.object(policy, "held_shares", of_first_layer):
            expected = probe.generate([LONG, SHORT], 60)
        kept = increase(probe, before, "num_entries_kept")
    assert kept != kept_by_all
    stages, partition = {"pipeline_parallel_size": 2}, {"VLLM_PP_LAYER_PARTITION": "1,3"}
    found = answers_of_workers(EMS_TINY, compression, stages, [LONG, SHORT], 60, partition)
    assert found.answers == expected
    assert [kept_by(stage) for stage in found.stats] == [kept, kept]


def test_columns_that_are_still_held_are_not_given_back():
    """A scheduler that frees more than was reported is found out before anything is read."""
    processed = Planner.processed

    def too_many(self, orders, report):
        if report is not None:
            report = type(report)([first + 1 for first in report.first_columns])
        return processed(self, orders, report)

    with (
        mock.patch.object(Planner, "processed", too_many),
        pytest.raises(StepRefused, match=r"columns before .* to be free"),
        engine(EMS, LLAMA, async_scheduling=False, **OPTIONS) as probe,
    ):
        probe.generate([LONG], 8)


def test_an_output_without_its_report_stops_the_engine():
    with (
        mock.patch("ems_vllm.engine.worker.reporting.attach_report"),
        pytest.raises(RuntimeError, match="compacted 1 times, and its output reports 0"),
        engine(EMS, LLAMA, async_scheduling=False, **OPTIONS) as probe,
    ):
        probe.generate([LONG], 8)
