# SPDX-License-Identifier: Apache-2.0
"""What every composition of policies must hold, whatever it prefers."""

from dataclasses import replace

import pytest
import torch
from policies.contexts import (
    BLOCK_SIZE,
    GROUP,
    HEAD_SIZE,
    NUM_KV_HEADS,
    NUM_SINKS,
    Row,
    build_context,
    entries,
)

from ems_vllm.config import ConfigError, load_config, recipes
from ems_vllm.policies.base import ALLOCATORS, MERGERS, SCORERS, SELECTORS
from ems_vllm.policies.policy import Policy

ROWS = (
    Row(num_entries=64, tail=9, budget=24, seed=1),
    Row(num_entries=40, tail=5, budget=32, num_scored=24, num_represented=25, seed=2),
    Row(num_entries=16, tail=8, budget=8, num_scored=0, num_represented=24, seed=3),
    Row(num_entries=96, tail=17, budget=8, seed=4),
)


@pytest.fixture(params=recipes.names())
def recipe(request):
    return request.param


def with_sinks(recipe, parts):
    """Parts, of which the selector keeps NUM_SINKS sinks."""
    name = parts.get("selector", load_config(recipe).selector.name())
    return {**parts, "selector": {"name": name, "num_sink_tokens": NUM_SINKS}}


def composed(recipe, **parts):
    """A recipe with other parts; None where they do not go together."""
    try:
        config = load_config({"recipe": recipe, "budget": 64, **parts})
    except ConfigError as error:
        if "does not fit together" not in str(error):
            raise
        return None
    return Policy.from_config(config)


def working_parts(policy):
    """What decides what a compaction does: budgets are given to it."""
    return tuple(part.model_dump_json() for part in (policy.scorer, policy.selector, policy.merger))


def distinct(pairs):
    """By a name of each, policies of which no two do the same."""
    found = {}
    for recipe, parts in pairs:
        policy = composed(recipe, **with_sinks(recipe, parts))
        if policy is not None:
            found.setdefault(
                working_parts(policy), (f"{recipe}-{next(iter(parts.values()))}", policy)
            )
    return dict(found.values())


# Every scorer with every merger, and with every selector.
POLICIES = distinct(
    [
        *((recipe, {"merger": merger}) for recipe in recipes.names() for merger in MERGERS),
        *((recipe, {"selector": selector}) for recipe in recipes.names() for selector in SELECTORS),
    ]
)


@pytest.fixture(scope="module", params=POLICIES)
def policy(request):
    return POLICIES[request.param]


def compacted(policy, rows):
    """(context, keys, values, scores before; the same after) of a compaction."""
    context = build_context(rows)
    tensors = (context.key_cache, context.value_cache, context.accumulated_pages)
    before = [tensor.clone() for tensor in tensors]
    policy.compact(context)
    return context, before, tensors


@pytest.fixture(scope="module")
def of_rows(policy):
    """`compacted`, which several tests look at."""
    return compacted(policy, ROWS)


def test_every_kept_entry_comes_from_the_row_and_sinks_stay(policy, of_rows):
    context, before, after = of_rows
    for row, item in enumerate(ROWS):
        old_keys, new_keys = (entries(t, context, row) for t in (before[0], after[0]))
        kept = slice(item.num_entries - item.budget, item.num_entries)
        assert not new_keys[:, :, kept].isnan().any()
        torch.testing.assert_close(
            new_keys[:, :, kept][:, :, : min(NUM_SINKS, item.budget)],
            old_keys[:, :, : min(NUM_SINKS, item.budget)],
            rtol=0,
            atol=0,
        )
        if policy.merger.name() == "none":
            candidates = old_keys[:, :, : item.num_entries]
            copies = (new_keys[:, :, kept, None] == candidates[:, :, None]).all(-1)
            assert copies.any(-1).all(), "a kept key is no copy of an entry"
            assert (copies.any(-2).sum(-1) == item.budget).all(), "an entry was kept twice"


def test_nothing_outside_the_targets_is_written(of_rows):
    context, before, after = of_rows
    targets = torch.zeros(context.key_cache.shape[1], dtype=torch.bool)
    for row, item in enumerate(ROWS):
        first = (item.num_entries - item.budget) // BLOCK_SIZE
        columns = context.block_table[row, first : item.num_entries // BLOCK_SIZE]
        targets[columns.long()] = True
    for old, new in zip(before, after, strict=True):
        assert torch.equal(
            old[:, ~targets].contiguous().view(torch.int32),
            new[:, ~targets].contiguous().view(torch.int32),
        )


class Exchange:
    """Sums over ranks that run one after the other: known once all have told theirs."""

    def __init__(self, num_ranks):
        self.told = [[] for _ in range(num_ranks)]

    def of_rank(self, rank, totals):
        def summed(tensor):
            own = self.told[rank]
            own.append(tensor.clone())
            known = totals[len(own) - 1] if len(own) <= len(totals) else tensor
            return known.clone(), len(self.told)

        return summed


def test_ranks_of_tensor_parallelism_keep_what_one_process_does(policy, of_rows):
    """Each rank has some kv_heads, with their query heads and columns of output projections."""
    whole, _, after = of_rows
    totals = []
    while True:
        exchange = Exchange(NUM_KV_HEADS)
        found = []
        for rank in range(NUM_KV_HEADS):
            context = of_rank(build_context(ROWS), rank, exchange.of_rank(rank, totals))
            policy.compact(context)
            found.append(context)
        told = [torch.stack(of_ranks).sum(0) for of_ranks in zip(*exchange.told, strict=True)]
        if len(told) == len(totals):
            break
        totals = told[: len(totals) + 1]
    for rank, context in enumerate(found):
        for mine, theirs in ((context.key_cache, after[0]), (context.value_cache, after[1])):
            for row in range(len(ROWS)):
                torch.testing.assert_close(
                    entries(mine, context, row)[:, 0], entries(theirs, whole, row)[:, rank]
                )


def of_rank(context, head, sum_of_ranks):
    """What the rank with one kv_head sees."""
    queries = slice(head * GROUP, (head + 1) * GROUP)
    columns = slice(head * GROUP * HEAD_SIZE, (head + 1) * GROUP * HEAD_SIZE)
    return replace(
        context,
        key_cache=context.key_cache[:, :, head : head + 1],
        value_cache=context.value_cache[:, :, head : head + 1],
        accumulated_pages=context.accumulated_pages[:, :, head : head + 1].contiguous(),
        query_ring=context.query_ring[:, :, :, queries].contiguous(),
        output_weights=[weights[:, columns] for weights in context.output_weights],
        first_head=head * GROUP,
        first_kv_head=head,
        sum_of_ranks=sum_of_ranks,
    )


def test_a_row_does_not_depend_on_the_others(policy, of_rows):
    context, _, after = of_rows
    for row, item in enumerate(ROWS):
        alone_context, _, alone = compacted(policy, [item])
        for together, single in zip(after[:2], alone[:2], strict=True):
            torch.testing.assert_close(
                entries(together, context, row), entries(single, alone_context, 0)
            )


def test_scores_are_positive_finite_and_zero_beyond_the_row(recipe):
    context = build_context(ROWS)
    scores = load_config(recipe).scorer.score(context)
    real = context.is_entry.expand_as(scores.weights)
    assert scores.weights.dtype == torch.float32
    assert scores.weights[real].isfinite().all()
    assert (scores.weights[real] >= 0).all()
    assert (scores.weights[~real] == 0).all()
    assert (scores.weights.sum(-1) > 0).all()


@pytest.mark.parametrize(
    "recipe", [name for name in recipes.names() if load_config(name).scorer.uses_accumulated]
)
def test_carried_scores_are_stored_with_the_entries(recipe):
    config = load_config({"recipe": recipe, "merger": {"name": "none"}})
    carry = config.scorer.score(build_context(ROWS)).carry
    context, _, after = compacted(Policy.from_config(config), ROWS)
    for row, item in enumerate(ROWS):
        stored = entries(after[2], context, row)
        stored = stored[:, :, item.num_entries - item.budget : item.num_entries]
        offered = carry[:, row, :, : item.num_entries]
        assert (stored[..., None] == offered[:, :, None]).any(-1).all()


@pytest.mark.parametrize(
    "registry", [SCORERS, ALLOCATORS, SELECTORS, MERGERS], ids=lambda r: r.kind
)
def test_every_component_is_documented_and_used_by_a_recipe_or_default(registry):
    for name in registry:
        cls = registry.get(name)
        assert cls.__doc__
        assert cls.name() == name
    used = {getattr(load_config(recipe), registry.kind).name() for recipe in recipes.names()}
    assert used == set(registry)
