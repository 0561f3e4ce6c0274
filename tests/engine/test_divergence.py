# SPDX-License-Identifier: Apache-2.0
"""What is measured of a compaction is what attention gives out before and after it."""

from dataclasses import replace

import pytest
import torch
from policies.contexts import GROUP, NUM_LAYERS, WINDOW, Row, build_context, entries, heads_as_rows

from ems_vllm.config import load_config
from ems_vllm.engine.group.divergence import Divergence
from ems_vllm.policies import reading
from ems_vllm.policies.policy import Policy

ROW = Row(num_entries=96, tail=9, budget=24, seed=4)
MERGED = "ems"
NOT_MERGED = {"recipe": "ems", "merger": "none"}


def policy(recipe):
    return Policy.from_config(load_config(recipe))


def measured(context, recipe, row=ROW):
    divergence = Divergence()
    with divergence.around(context, "a", row.tail):
        policy(recipe).compact(context)
    found = divergence.take()
    assert list(found) == ["a"]
    assert divergence.take() == {}
    return found["a"]


def outputs(context, first, num_queries=WINDOW):
    """[num_layers, num_queries, num_heads, head_size]: of entries from `first` on, in float64."""
    keys, values = (
        entries(cache, context, 0).double()[:, :, first:]
        for cache in (context.key_cache.float(), context.value_cache.float())
    )
    if context.key_scales is not None:
        keys = keys * context.key_scales[:, None, None, None]
    keys, values = (tensor.repeat_interleave(GROUP, 1) for tensor in (keys, values))
    found = []
    for age in range(num_queries):
        slot = (int(context.end_positions[0]) - 1 - age) % WINDOW
        query = context.query_ring[:, 0, slot].double()
        visible = keys.shape[2] - age
        logits = torch.einsum("lhd,lhjd->lhj", query, keys[:, :, :visible]) * context.scale
        found.append(torch.einsum("lhj,lhjd->lhd", logits.softmax(-1), values[:, :, :visible]))
    return torch.stack(found, 1)


def expected_errors(context, recipe, row=ROW, num_queries=WINDOW):
    """Compacts the context."""
    before = outputs(context, 0, num_queries)
    policy(recipe).compact(context)
    after = outputs(context, row.num_entries - row.budget, num_queries)
    change, norm = ((after - before).flatten(2).norm(dim=-1), before.flatten(2).norm(dim=-1))
    return (change / norm).mean(1).float()


@pytest.mark.parametrize("recipe", [MERGED, NOT_MERGED, "snapkv"], ids=str)
def test_errors_are_those_of_outputs_before_and_after(recipe):
    found = measured(build_context([ROW]), recipe)
    assert found.shape == (NUM_LAYERS,)
    torch.testing.assert_close(found, expected_errors(build_context([ROW]), recipe))
    assert found.min() > 0.05
    # Layers have keys and queries of their own.
    assert found[0] != found[1]


def test_what_keeps_everything_changes_nothing():
    row = replace(ROW, budget=ROW.num_entries)
    assert measured(build_context([row]), NOT_MERGED, row).max() < 1e-6


def test_heads_that_are_rows_are_one_layer_together():
    found = measured(heads_as_rows(build_context([ROW])), "snapkv")
    torch.testing.assert_close(found, measured(build_context([ROW]), "snapkv"))


def test_queries_that_were_not_recorded_do_not_count():
    contexts = [build_context([ROW]) for _ in range(2)]
    for context in contexts:
        context.num_queries.fill_(2)
        for age in (2, 3):
            slot = (int(context.end_positions[0]) - 1 - age) % WINDOW
            context.query_ring[:, 0, slot] = torch.nan
    expected = expected_errors(contexts[0], "snapkv", num_queries=2)
    torch.testing.assert_close(measured(contexts[1], "snapkv"), expected)


def test_a_float8_cache_is_scaled():
    def scaled():
        context = build_context([ROW])
        return replace(
            context,
            key_cache=context.key_cache.to(torch.float8_e4m3fn),
            value_cache=context.value_cache.to(torch.float8_e4m3fn),
            key_scales=torch.tensor([0.5, 2.0]),
        )

    torch.testing.assert_close(measured(scaled(), "snapkv"), expected_errors(scaled(), "snapkv"))


def test_slices_of_any_size_give_the_same(monkeypatch):
    whole = measured(build_context([ROW]), NOT_MERGED)
    by_head = measured(heads_as_rows(build_context([ROW])), NOT_MERGED)
    # Ten entries or so, of one layer and one row.
    monkeypatch.setattr(reading, "SLICE_BYTES", 24 << 10)
    sliced = reading.parts(build_context([ROW]), 600)
    assert len(sliced) == NUM_LAYERS
    assert sliced[0].step < ROW.budget
    torch.testing.assert_close(measured(build_context([ROW]), NOT_MERGED), whole)
    of_rows = measured(heads_as_rows(build_context([ROW])), NOT_MERGED)
    torch.testing.assert_close(of_rows, by_head)


def test_outputs_that_are_no_numbers_are_as_wrong_as_can_be():
    context = build_context([ROW])
    context.query_ring[0] = torch.nan
    found = measured(context, {"recipe": "keydiff"})
    assert found[0] == 10.0
    assert 0 < found[1] < 10.0
