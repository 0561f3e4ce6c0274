# SPDX-License-Identifier: Apache-2.0
"""The compression plan: the worked example, its invariants, and its argument checks."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm._C import CompressionPlan

PARAMS = {
    "prompt_len": 1000,
    "block_size": 16,
    "budget_blocks": 8,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}

NAMES = (*PARAMS, "global_queries", "prefill_interval", "prefill_budget_blocks")


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    block_size = draw(st.sampled_from([1, 2, 8, 16]))
    budget_blocks = draw(st.integers(0, 12))
    return CompressionPlan(
        prompt_len=draw(st.integers(0, 400)),
        block_size=block_size,
        budget_blocks=budget_blocks,
        recent_window=draw(st.integers(0, 80)),
        recompress_interval=block_size * draw(st.integers(0, 6)),
        min_blocks_saved=draw(st.integers(1, 5)),
        global_queries=draw(st.none() | st.integers(1, 100)),
        prefill_interval=block_size * draw(st.sampled_from([0, 0, 1, 2, 5])),
        prefill_budget_blocks=budget_blocks + draw(st.sampled_from([0, 0, 3])),
    )


def horizon(plan: CompressionPlan) -> int:
    """A length at which every plan of plans() that can compress has done so several times."""
    budget = plan.budget_blocks * plan.block_size
    return 2 * plan.prompt_len + 2 * budget + plan.recent_window + 5 * plan.recompress_interval + 50


def test_worked_example():
    plan = CompressionPlan(**PARAMS)
    assert plan.compresses_prompt
    assert plan.may_compress
    assert plan.columns(999) == (0, 0)
    assert plan.columns(1000) == (52, 60)
    assert plan.columns(1055) == (52, 60)
    assert plan.columns(1056) == (56, 64)
    assert plan.next_compaction(0) == 1000
    assert plan.next_compaction(1000) == 1056
    assert plan.max_shared_tokens == 52 * 16
    # The step that compacts at 1000 has not been processed yet, the one after it has.
    assert plan.max_live_columns(1000) == 63
    assert plan.max_live_columns(1001) == 63 - 52


def test_worked_example_within_a_prompt():
    plan = CompressionPlan(**PARAMS, prefill_interval=128, global_queries=64)
    # For the first time when 128 tokens more than budget and recent window have been processed.
    at = [0]
    while at[-1] < 1000:
        at.append(plan.next_compaction(at[-1]))
    assert at == [0, 288, 416, 544, 672, 800, 928, 1000]
    assert plan.num_within_prompt == 6
    assert [plan.columns(n) for n in at[1:4]] == [(8, 16), (16, 24), (24, 32)]
    assert plan.columns(1000) == (52, 60)
    # What others may share ends where the first compaction writes.
    assert plan.max_shared_tokens == 8 * 16
    # The last 64 queries before each, or as many as there are since the one before.
    assert [plan.first_scored_query(n) for n in (0, 300, 928)] == [288 - 64, 416 - 64, 936]
    assert plan.max_replay_columns(1000) == plan.max_replay_columns(10**6) == 27


def test_levels_are_compacted_together_within_a_prompt():
    most = CompressionPlan(**PARAMS, prefill_interval=128)
    least = CompressionPlan(
        **PARAMS | {"budget_blocks": 2}, prefill_interval=128, prefill_budget_blocks=8
    )
    for num_processed in range(1000):
        assert least.next_compaction(num_processed) == most.next_compaction(num_processed)
        assert least.columns(num_processed)[1] == most.columns(num_processed)[1]
    assert least.columns(288) == (14, 16)


def test_never_compressed():
    plan = CompressionPlan(**PARAMS | {"budget_blocks": 0})
    assert not plan.may_compress
    assert plan.columns(10**6) == (0, 0)
    assert plan.next_compaction(0) is None
    assert plan.max_shared_tokens is None


def test_short_prompt_is_compressed_beyond_its_prompt():
    plan = CompressionPlan(**PARAMS | {"prompt_len": 100})
    assert not plan.compresses_prompt
    assert plan.may_compress
    assert plan.max_shared_tokens == 96
    first_compaction = plan.next_compaction(0)
    assert plan.columns(first_compaction - 1) == (0, 0)
    first, _ = plan.columns(first_compaction)
    assert first * 16 >= 100


@settings(deadline=None)
@given(plans())
def test_columns_never_go_back(plan):
    previous = (0, 0)
    for num_processed in range(horizon(plan)):
        columns = plan.columns(num_processed)
        assert columns[0] >= previous[0]
        assert columns[1] >= previous[1]
        previous = columns


@settings(deadline=None)
@given(plans())
def test_budget_lies_between_the_columns(plan):
    for num_processed in range(horizon(plan)):
        first, tail = plan.columns(num_processed)
        if first == 0:
            assert tail == 0
            continue
        assert tail - first == plan.budget_blocks
        live = num_processed - first * plan.block_size
        assert live >= plan.budget_blocks * plan.block_size + plan.recent_window
        if plan.recompress_interval > 0:
            in_tail = num_processed - tail * plan.block_size
            interval = plan.recompress_interval
            if num_processed < plan.prompt_len:
                # The last chunk of a prompt is longer than an interval by a block at most.
                interval = plan.prefill_interval + plan.block_size
            assert in_tail < plan.recent_window + interval + plan.block_size


@settings(deadline=None)
@given(plans())
def test_identity_when_the_budget_covers_the_length(plan):
    if plan.budget_blocks > 0:
        for num_processed in range(plan.budget_blocks * plan.block_size + plan.recent_window + 1):
            assert plan.columns(num_processed) == (0, 0)


@settings(deadline=None)
@given(plans())
def test_targets_are_never_shared(plan):
    """Neither a prompt column that may be shared nor a live column before it is written."""
    for num_processed in range(horizon(plan)):
        first, _ = plan.columns(num_processed)
        if first > 0:
            assert first * plan.block_size >= plan.max_shared_tokens
            if not plan.compresses_prompt:
                assert first * plan.block_size >= plan.prompt_len


@settings(deadline=None)
@given(plans())
def test_first_compaction_frees_enough(plan):
    at = plan.next_compaction(0)
    if at is None:
        assert plan.columns(horizon(plan)) == plan.columns(0)
    else:
        enough = plan.min_blocks_saved
        if plan.num_within_prompt:
            # The compactions after it free as much each.
            enough = min(enough, plan.prefill_interval // plan.block_size)
        assert plan.columns(at)[0] >= enough


@settings(deadline=None)
@given(plans(), st.integers(1, 3))
def test_a_prompt_of_any_length_takes_as_many_columns(plan, times):
    if plan.num_within_prompt and plan.recompress_interval:
        longer = CompressionPlan(
            prompt_len=plan.prompt_len + times * plan.prefill_interval,
            **{name: getattr(plan, name) for name in NAMES if name != "prompt_len"},
        )
        assert longer.num_within_prompt == plan.num_within_prompt + times
        if plan.num_within_prompt > 1:
            assert longer.max_replay_columns(10**6) == plan.max_replay_columns(10**6)


@settings(deadline=None)
@given(plans())
def test_live_columns_bound(plan):
    """Replays decoding token by token; a step's columns are given back once it is processed."""
    freed = plan.columns(max(0, plan.prompt_len - 1))[0]
    for started_at in range(plan.prompt_len, horizon(plan)):
        held = -(-(started_at + 1) // plan.block_size) - freed
        assert held <= plan.max_live_columns(started_at)
        if plan.compresses_prompt and started_at > plan.prompt_len and plan.recompress_interval:
            in_tail = plan.recent_window + plan.recompress_interval
            assert plan.max_live_columns(started_at) <= plan.budget_blocks + (
                in_tail // plan.block_size + 2
            )
        freed = plan.columns(started_at)[0]


@settings(deadline=None)
@given(plans())
def test_next_compaction_is_the_next_change(plan):
    end = horizon(plan)
    changes = [n for n in range(1, end) if plan.columns(n) != plan.columns(n - 1)]
    for num_processed in range(0, end - 1, 7):
        expected = next((n for n in changes if n > num_processed), None)
        actual = plan.next_compaction(num_processed)
        assert actual == expected or (expected is None and (actual is None or actual >= end))


@settings(deadline=None)
@given(plans(), plans())
def test_value_semantics(one, other):
    for twin in (copy.copy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one
        assert hash(twin) == hash(one)
    assert (one == other) == (repr(one) == repr(other))
    assert one != repr(one)
    assert eval(repr(one)) == one


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_len", -1, "prompt_len must be in 0..2147483647, got -1"),
        ("block_size", 0, "block_size must be in 1..2147483647, got 0"),
        ("budget_blocks", -3, "budget_blocks must be in 0..2147483647, got -3"),
        ("recent_window", 2**31, "recent_window must be in 0..2147483647, got 2147483648"),
        ("recompress_interval", -16, "recompress_interval must be in 0..2147483647, got -16"),
        ("recompress_interval", 40, r"recompress_interval must be a multiple of block_size \(16\)"),
        ("prefill_interval", -16, "prefill_interval must be in 0..2147483647, got -16"),
        ("prefill_interval", 40, r"prefill_interval must be a multiple of block_size \(16\)"),
        ("prefill_budget_blocks", 7, "prefill_budget_blocks must be in 8..2147483647, got 7"),
        ("min_blocks_saved", 0, "min_blocks_saved must be in 1..2147483647, got 0"),
    ],
)
def test_arguments_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=message):
        CompressionPlan(**PARAMS | {name: value})


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match=r"num_processed must be in 0\.\."):
        CompressionPlan(**PARAMS).columns(-1)


def test_arguments_are_keywords():
    with pytest.raises(TypeError):
        CompressionPlan(1000, 16, 8, 32, 64, 1)


@settings(deadline=None)
@given(plans())
def test_a_limited_number_of_queries_does_not_depend_on_hits(plan):
    """Whatever hit is taken, the same queries of the prompt are left to score."""
    first = plan.first_scored_query()
    if plan.global_queries is None or not plan.compresses_prompt:
        assert first == 0
        return
    due = plan.next_compaction(0)
    assert first >= plan.max_shared_tokens
    assert due - first <= plan.global_queries
    # As many as were asked for, where a hit always leaves them.
    if plan.global_queries <= due - plan.max_shared_tokens:
        assert due - first == plan.global_queries


@settings(deadline=None)
@given(plans())
def test_queries_within_a_prompt_score_once(plan):
    """For the compaction that comes next after them, and whichever chunk they are in."""
    if not plan.compresses_prompt:
        return
    before, due = 0, plan.next_compaction(0)
    while before < plan.prompt_len:
        first = plan.first_scored_query(before)
        assert {plan.first_scored_query(n) for n in range(before, due)} == {first}
        assert before <= first < due
        if before and plan.global_queries is None:
            assert first == before
        before, due = due, plan.next_compaction(due)


@settings(deadline=None)
@given(plans(), st.integers(1, 900))
def test_replay_columns_bound(plan, num_tokens):
    """Replays a preempted request, in chunks that end where a compaction falls due."""
    start, freed = 0, 0
    while start < num_tokens:
        due = plan.next_compaction(start)
        end = num_tokens if due is None else min(due, num_tokens)
        assert -(-end // plan.block_size) - freed <= plan.max_replay_columns(num_tokens)
        # The output of this step is processed before the next one is scheduled.
        freed = plan.columns(start)[0]
        start = end
    assert plan.max_replay_columns(num_tokens) <= -(-num_tokens // plan.block_size)
