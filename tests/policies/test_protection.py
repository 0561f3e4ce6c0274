# SPDX-License-Identifier: Apache-2.0
"""Protected entries are the same bits after compactions, whatever the policy prefers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies.contexts import (
    BLOCK_SIZE,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_SINKS,
    Row,
    build_context,
    entries,
    heads_as_rows,
)

from ems_vllm.config import load_config, recipes
from ems_vllm.policies.allocators.ada import AdaAllocator
from ems_vllm.policies.base import MERGERS
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy
from ems_vllm.policies.protection import kept_of

ROWS = (
    Row(num_entries=64, tail=9, budget=24, seed=1),
    # Protects nothing.
    Row(num_entries=40, tail=5, budget=32, num_scored=24, num_represented=25, seed=2),
    Row(num_entries=96, tail=17, budget=16, seed=4),
)
NUM_PROTECTED = (20, 0, 12)


def policy_of(recipe: str, merger: str) -> Policy:
    # All that do not stay are candidates, and the least alike are merged.
    options = {"similarity_threshold": 0.0, "merge_keys": True} if merger == "ems" else {}
    return Policy.from_config(
        load_config(
            {
                "recipe": recipe,
                "budget": 64,
                "selector": {"num_sink_tokens": NUM_SINKS},
                "merger": {"name": merger, **options},
            }
        )
    )


def protecting(context: CompactionContext, seed: int = 0) -> CompactionContext:
    """Some entries of each kv_head, other ones in each, as many as NUM_PROTECTED says."""
    shape = (NUM_LAYERS, context.num_rows, context.num_kv_heads, context.max_entries)
    mask = torch.zeros(shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for row, count in enumerate(NUM_PROTECTED):
        free = int(context.num_entries[row]) - NUM_SINKS
        for of_layer in mask[:, row]:
            for head in of_layer:
                head[NUM_SINKS + torch.randperm(free, generator=generator)[:count]] = True
    return replace(context, is_protected=mask)


def poisoned(context: CompactionContext, row: int) -> CompactionContext:
    """The same after its columns before the targets were given to somebody else."""
    for cache in (context.key_cache, context.value_cache, context.accumulated_pages):
        freed = context.block_table[row, : int(context.target_columns[row])].long()
        cache[:, freed] = float("nan")
    return context


@pytest.fixture(params=recipes.names())
def recipe(request):
    return request.param


# Each scorer and selector with a merger that merges most, each merger with two scorers.
PAIRS = [
    *((recipe, "ems") for recipe in recipes.names()),
    *((recipe, merger) for recipe in ("ems", "knorm") for merger in MERGERS if merger != "ems"),
]


@pytest.fixture(params=PAIRS, ids="-".join)
def policy(request):
    return policy_of(*request.param)


def assert_kept(policy: Policy, context: CompactionContext) -> torch.Tensor:
    """Compact; every protected entry and its scores are copied to where it is kept."""
    mask = context.is_protected
    names = ("key_cache", "value_cache")
    before = [[entries(getattr(context, n), context, r).clone() for n in names] for r in range(3)]
    kept_idx = policy.compact(context)
    for row, count in enumerate(NUM_PROTECTED):
        poisoned(context, row)
        first = int(context.target_columns[row]) * BLOCK_SIZE
        for layer in range(NUM_LAYERS):
            for head in range(NUM_KV_HEADS):
                kept = kept_idx[layer, row, head].tolist()
                wanted = mask[layer, row, head].nonzero().flatten().tolist()
                assert len(wanted) == count
                assert set(wanted) | set(range(NUM_SINKS)) <= set(kept)
                slots = [first + kept.index(entry) for entry in wanted]
                for old, name in zip(before[row], names, strict=True):
                    new = entries(getattr(context, name), context, row)
                    assert torch.equal(new[layer, head, slots], old[layer, head, wanted])
    return kept_idx


def test_protected_entries_are_the_same_bits(policy):
    assert_kept(policy, protecting(build_context(ROWS)))


def test_without_protection_they_would_not_stay(policy):
    """The control of the test above."""
    mask = protecting(build_context(ROWS)).is_protected
    kept_idx = policy.compact(build_context(ROWS))
    assert kept_of(mask, kept_idx)[:, 0].sum() < mask[:, 0].sum()


def test_they_survive_one_compaction_after_the_other(recipe):
    """Rows are compacted three times, each time from what the time before left."""
    policy = policy_of(recipe, "ems")
    context = protecting(build_context(ROWS))
    wanted = []
    for row, item in enumerate(ROWS):
        for name in ("key_cache", "value_cache"):
            live = entries(getattr(context, name), context, row)[:, :, : item.num_entries]
            mask = context.is_protected[:, row, :, : item.num_entries]
            wanted.append(live[mask].clone())
    for _ in range(3):
        kept_idx = assert_kept(policy, context)
        mask = kept_of(context.is_protected, kept_idx)
        # What was kept, and behind it the block that comes next, of which nothing is protected.
        budgets = context.budgets
        longer = torch.zeros((*mask.shape[:3], int(budgets.max()) + BLOCK_SIZE), dtype=torch.bool)
        longer[..., : mask.shape[-1]] = mask
        later = build_context(
            [Row(item.budget + BLOCK_SIZE, 3, item.budget, seed=9) for item in ROWS]
        )
        for row, item in enumerate(ROWS):
            old = int(context.target_columns[row])
            columns = item.budget // BLOCK_SIZE
            source = context.block_table[row, old : old + columns].long()
            target = later.block_table[row, :columns].long()
            for name in ("key_cache", "value_cache", "accumulated_pages"):
                values = getattr(context, name)[:, source]
                if not (name == "accumulated_pages" and values.isnan().any()):
                    getattr(later, name)[:, target] = values
        context = replace(
            later, is_protected=longer, is_untouched=torch.zeros(len(ROWS), dtype=torch.bool)
        )
    for row, item in enumerate(ROWS):
        for at, name in enumerate(("key_cache", "value_cache")):
            live = entries(getattr(context, name), context, row)[:, :, : item.budget]
            found = live[context.is_protected[:, row, :, : item.budget]]
            assert torch.equal(found, wanted[2 * row + at])


def test_rows_that_protect_nothing_are_the_same_bits_as_without(policy):
    alone, beside = build_context(ROWS), protecting(build_context(ROWS))
    expected = policy.compact(alone)
    got = policy.compact(beside)
    assert torch.equal(got[:, 1], expected[:, 1])
    for name in ("key_cache", "value_cache"):
        assert torch.equal(
            entries(getattr(beside, name), beside, 1), entries(getattr(alone, name), alone, 1)
        )


def test_a_mask_of_nothing_changes_nothing(policy):
    plain, masked = build_context(ROWS), protecting(build_context(ROWS))
    masked = replace(masked, is_protected=torch.zeros_like(masked.is_protected))
    assert torch.equal(policy.compact(masked), policy.compact(plain))
    for row in range(len(ROWS)):
        for name in ("key_cache", "value_cache"):
            got, expected = (entries(getattr(c, name), c, row) for c in (masked, plain))
            assert torch.equal(got, expected)


def test_heads_as_rows_protect_alike(policy):
    if policy.scorer.across_heads or policy.selector.across_heads:
        pytest.skip("does not go with heads as rows")
    context = protecting(build_context(ROWS))
    split = heads_as_rows(build_context(ROWS))
    split = replace(split, is_protected=context.is_protected.flatten(1, 2)[:, :, None])
    expected = policy.compact(context)
    got = policy.compact(split)
    assert torch.equal(got.flatten(1, 2), expected.flatten(1, 2))


@given(st.integers(0, 2**32 - 1))
def test_any_entries_may_be_protected(seed):
    assert_kept(policy_of("ems", "ems"), protecting(build_context(ROWS), seed))


def test_ada_gives_every_head_room_for_what_is_protected():
    rows = (Row(num_entries=64, tail=9, budget=24, seed=1),)
    context = heads_as_rows(build_context(rows))
    policy = policy_of("snapkv", "none")
    scores = policy.score(context)
    # One head has all the attention, so that the other would be left with one page.
    weights = scores.weights.clone()
    weights[:, 0] += 1
    scores = replace(scores, weights=weights)
    context = replace(
        context,
        **{
            name: getattr(context, name)[:1]
            for name in ("key_cache", "value_cache", "accumulated_pages", "query_ring")
        },
    )
    scores = replace(scores, weights=scores.weights[:1])
    unlike = AdaAllocator(safeguard=0.0)
    assert unlike.deal(context, scores, [24]).tolist() == [[5, 1]]
    mask = torch.zeros((1, NUM_KV_HEADS, 1, 64), dtype=torch.bool)
    mask[..., 30:42] = True
    assert unlike.deal(replace(context, is_protected=mask), scores, [24]).tolist() == [[4, 2]]
