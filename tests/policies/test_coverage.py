# SPDX-License-Identifier: Apache-2.0
"""How many entries hold a share of the score: counted entry by entry, and bounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies.contexts import BLOCK_SIZE, NUM_KV_HEADS, NUM_LAYERS, NUM_SINKS, Row, build_context
from policies.test_contract import ROWS, compacted

from ems_vllm.config import load_config, recipes
from ems_vllm.policies.base import Scores
from ems_vllm.policies.coverage import Coverage, held_shares
from ems_vllm.policies.policy import Policy

NUM_HEADS = NUM_LAYERS * NUM_KV_HEADS


@pytest.fixture(params=[n for n in recipes.names() if not load_config(n).selector.goes_by_budget])
def recipe(request):
    return request.param


def held(context, scores: Scores) -> torch.Tensor:
    return held_shares(context, scores.weights, scores.compared)


def shares_one_by_one(context, ranked, scores: Scores, row: int, count: int) -> float:
    """What the best `count` entries of a row hold, summed over heads."""
    total = 0.0
    for layer in range(context.num_layers):
        for head in range(context.num_kv_heads):
            num_entries = int(context.num_entries[row])
            weights = ranked[layer, row, head, :num_entries].tolist()
            compared = scores.compared[layer, row, head, :num_entries].tolist()
            sinks = range(int(context.num_protected[row]))
            order = sorted(range(num_entries), key=lambda e: (e not in sinks, -weights[e]))
            whole = math.fsum(compared)
            total += math.fsum(compared[entry] for entry in order[:count]) / whole if whole else 1
    return total


def test_shares_are_those_of_the_entries_that_would_stay(recipe):
    context = build_context(ROWS)
    policy = Policy.from_config(load_config(recipe))
    scores = policy.score(context)
    held = policy.held_shares(context, scores)
    ranked = policy.selector.rank(context, scores)
    assert held.shape == (len(ROWS), context.max_budget // BLOCK_SIZE)
    for row, item in enumerate(ROWS):
        found = held[row, : item.budget // BLOCK_SIZE].tolist()
        expected = [
            shares_one_by_one(context, ranked, scores, row, BLOCK_SIZE * (n + 1))
            for n in range(len(found))
        ]
        assert found == pytest.approx(expected, abs=NUM_HEADS * 1e-5)


def test_a_row_does_not_depend_on_the_others(recipe):
    policy = Policy.from_config(load_config(recipe))
    context = build_context(ROWS)
    held = policy.held_shares(context, policy.score(context))
    for row, item in enumerate(ROWS):
        alone = build_context([item])
        (expected,) = policy.held_shares(alone, policy.score(alone))
        torch.testing.assert_close(held[row, : len(expected)], expected, atol=1e-6, rtol=1e-6)


def test_all_entries_hold_everything():
    context = build_context([Row(num_entries=40, tail=5, budget=40)])
    scores = load_config("ems").scorer.score(context)
    assert held(context, scores)[0, -1].item() == pytest.approx(NUM_HEADS, abs=1e-6)


def test_heads_in_which_nothing_is_scored_lose_nothing():
    context = build_context([Row(num_entries=40, tail=5, budget=16)])
    weights = torch.zeros_like(context.new_scores())
    assert held(context, Scores(weights)).tolist() == [[NUM_HEADS, NUM_HEADS]]


def test_what_is_reserved_counts_first():
    context = build_context([Row(num_entries=40, tail=5, budget=8)])
    weights = torch.zeros_like(context.new_scores())
    # A sink that nobody looks at takes the place of the least of the best.
    weights[..., 8:16] = torch.arange(1.0, 9.0)
    (found,) = held(context, Scores(weights)).tolist()
    assert found == pytest.approx([NUM_HEADS * (36 - sum(range(1, NUM_SINKS + 1))) / 36])


HELD = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(sorted)


@given(HELD, st.floats(0.01, 0.99), st.integers(1, 300), st.integers(0, 300), st.integers(0, 45))
def test_the_fewest_blocks_within_bounds(held, share, min_budget, reserved, before):
    count = Coverage(share, min_budget).num_blocks(held, 1, BLOCK_SIZE, reserved, before)
    most = len(held)
    least = min(most, max(1, before, -(-max(min_budget, reserved) // BLOCK_SIZE)))
    assert least <= count <= most
    assert count == most or held[count - 1] >= share
    assert all(held[n - 1] < share for n in range(least, count))


def test_a_compaction_of_all_there_is_changes_nothing():
    """Where less is held than may stay, everything does: bit for bit, where it was."""
    rows = [Row(num_entries=40, tail=5, budget=40, num_represented=9, seed=5)]
    _, before, after = compacted(Policy.from_config(load_config("ems")), rows)
    for old, new in zip(before[:2], after[:2], strict=True):
        assert torch.equal(old.contiguous().view(torch.int32), new.contiguous().view(torch.int32))
