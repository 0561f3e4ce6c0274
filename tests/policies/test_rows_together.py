# SPDX-License-Identifier: Apache-2.0
"""Compactions in which the kv_heads of a request are rows that share blocks."""

from dataclasses import replace

import pytest
import torch
from policies.contexts import BLOCK_SIZE, NUM_KV_HEADS, Row, build_context, entries, heads_as_rows

from ems_vllm.config import load_config, recipes
from ems_vllm.ops import reference_operators
from ems_vllm.policies.policy import Policy

ROWS = (
    Row(num_entries=64, tail=9, budget=24, seed=1),
    Row(num_entries=40, tail=3, budget=16, num_scored=24, num_represented=25, seed=2),
)


def compacted(recipe, context):
    """The context, after a compaction."""
    Policy.from_config(load_config(recipe)).compact(context)
    return context


def test_random_gives_heads_the_same_numbers_where_they_are_rows():
    context = build_context(ROWS)
    scorer = load_config("random").scorer
    expected = scorer.score(context).weights
    got = scorer.score(heads_as_rows(context)).weights
    assert torch.equal(got.unflatten(1, (len(ROWS), NUM_KV_HEADS)).squeeze(3), expected)
    assert not torch.equal(got[:, 0], got[:, 1])


# Those that choose entries for all kv_heads of a layer do not go with heads as rows.
OF_HEADS = [
    name
    for name in recipes.names()
    if not (load_config(name).scorer.across_heads or load_config(name).selector.across_heads)
]


@pytest.mark.parametrize("recipe", OF_HEADS)
def test_heads_are_compacted_alike_as_rows(recipe):
    expected = compacted(recipe, build_context(ROWS))
    got = compacted(recipe, heads_as_rows(build_context(ROWS)))
    for row in range(len(ROWS)):
        for cache in ("key_cache", "value_cache"):
            by_head = entries(getattr(expected, cache), expected, row)
            for head in range(NUM_KV_HEADS):
                as_row = entries(getattr(got, cache), got, row * NUM_KV_HEADS + head)
                torch.testing.assert_close(as_row[:, 0], by_head[:, head])


@pytest.mark.parametrize("recipe", ["ems", "random"])
def test_heads_may_take_blocks_of_each_other(recipe):
    """As if every row had a copy of the blocks that it reads."""
    shared = heads_as_rows(build_context(ROWS))
    table = shared.block_table.clone()
    for row in range(shared.num_rows):
        other = row ^ 1
        first, count = int(shared.target_columns[row]), int(shared.budgets[row]) // BLOCK_SIZE
        table[row, first : first + count] = shared.block_table[other, :count]
    shared = replace(shared, block_table=table, score_table=table)
    assert shared.accumulated_pages is not None
    own = replace(
        shared,
        **{
            name: getattr(shared, name)[:, table.flatten().long()]
            for name in ("key_cache", "value_cache", "accumulated_pages")
        },
        block_table=torch.arange(table.numel(), dtype=torch.int32).view_as(table),
    )
    own = replace(own, score_table=own.block_table)
    # They write rows in order, so that one that does not know of the others would be wrong.
    with reference_operators():
        for context in (own, shared):
            compacted(recipe, context)
    for row in range(shared.num_rows):
        first, budget = int(shared.target_columns[row]) * BLOCK_SIZE, int(shared.budgets[row])
        for cache in ("key_cache", "value_cache"):
            got, expected = (
                entries(getattr(context, cache), context, row)[:, :, first : first + budget]
                for context in (shared, own)
            )
            torch.testing.assert_close(got, expected)
