# SPDX-License-Identifier: Apache-2.0
"""In which order selectors keep entries."""

from __future__ import annotations

import pytest
import torch
from policies.contexts import GROUP, HEAD_SIZE, NUM_SINKS, OUTPUT_WEIGHTS, build_context, entries
from policies.test_scorers import ROWS, each_head
from torch.nn.functional import cosine_similarity

from ems_vllm.config import ConfigError, load_config
from ems_vllm.policies.output_norms import output_norms
from ems_vllm.policies.policy import Policy

NUM_KEPT = 24


def kept(settings):
    """The context, scores before, and by row, layer and head the entries that stay."""
    context = build_context(ROWS)
    policy = Policy.from_config(load_config(settings))
    scores = policy.score(context)
    kept_idx = policy.place(context, scores)
    found = {
        (row, layer, head): [e for e in kept_idx[layer, row, head].tolist() if e >= 0]
        for row, layer, head in each_head()
    }
    return context, scores, found


def test_output_norms_are_those_of_projected_values():
    context = build_context(ROWS)
    norms = output_norms(context)
    for row, layer, head in each_head():
        values = entries(context.value_cache, context, row)[layer, head]
        values = values[: int(context.num_entries[row])]
        total = torch.zeros(len(values))
        for query_head in range(head * GROUP, (head + 1) * GROUP):
            part = slice(query_head * HEAD_SIZE, (query_head + 1) * HEAD_SIZE)
            total += (values @ OUTPUT_WEIGHTS[layer][:, part].T).abs().sum(-1) / GROUP
        torch.testing.assert_close(norms[layer, row, head, : len(values)], total)
        assert (norms[layer, row, head, len(values) :] == 0).all()


def test_critical_fills_half_by_scores_and_half_by_what_values_do():
    selector = {"name": "critical", "num_sink_tokens": 0, "epsilon": 0.01}
    context, scores, found = kept({"recipe": "snapkv", "selector": selector})
    context = build_context(ROWS)
    norms = output_norms(context)
    for (row, layer, head), got in found.items():
        num_entries, budget = int(context.num_entries[row]), int(context.budgets[row])
        sinks = set(range(int(context.num_protected[row])))
        weights = scores.weights[layer, row, head, :num_entries]
        first = set(weights.topk(budget // 2).indices.tolist())
        weighted = (weights + 0.01) * norms[layer, row, head, :num_entries]
        order = weighted.argsort(descending=True).tolist()
        rest = [entry for entry in order if entry not in first | sinks]
        expected = first | sinks
        expected |= set(rest[: budget - len(expected)])
        assert set(got) == expected


def test_chunks_stay_whole_and_the_same_in_all_heads():
    selector = {"name": "chunks", "num_sink_tokens": NUM_SINKS, "chunk_length": 5}
    _, scores, found = kept({"recipe": "snapkv", "selector": selector})
    for row in range(len(ROWS)):
        num_entries, budget = ROWS[row].num_entries, ROWS[row].budget
        for layer in range(2):
            of_layer = scores.weights[layer, row, :, :num_entries].mean(0)
            means = [of_layer[i : i + 5].mean().item() for i in range(0, num_entries, 5)]
            order = sorted(range(len(means)), key=lambda chunk: -means[chunk])
            wanted = [
                e for chunk in order for e in range(5 * chunk, min(5 * chunk + 5, num_entries))
            ]
            sinks = list(range(NUM_SINKS))
            rest = [entry for entry in wanted if entry not in sinks]
            expected = sorted(sinks + rest[: budget - NUM_SINKS])
            assert found[row, layer, 0] == found[row, layer, 1] == expected


def test_similar_sets_are_divided_where_neighbours_are_least_alike():
    selector = {"name": "similar_sets", "num_sink_tokens": NUM_SINKS, "alone_share": 0.0}
    context, scores, found = kept({"recipe": "h2o", "selector": selector})
    context = build_context(ROWS)
    for (row, layer, head), got in found.items():
        num_entries, budget = ROWS[row].num_entries, ROWS[row].budget
        keys = entries(context.key_cache, context, row)[layer, head, :num_entries]
        alike = cosine_similarity(keys[:-1], keys[1:], dim=-1)
        alike[:NUM_SINKS] = -2.0  # Sinks are sets of their own.
        ends = sorted(alike.argsort()[: budget - 1].tolist())
        starts = [0, *(end + 1 for end in ends)]
        stops = [*starts[1:], num_entries]
        weights = scores.weights[layer, row, head]
        expected = [
            start + int(weights[start:stop].argmax())
            for start, stop in zip(starts, stops, strict=True)
        ]
        assert got == expected


def test_entries_with_the_highest_scores_are_alone():
    context = build_context(ROWS[:1])
    selector = {"name": "similar_sets", "num_sink_tokens": NUM_SINKS, "alone_share": 0.2}
    policy = Policy.from_config(load_config({"recipe": "h2o", "selector": selector}))
    # All keys alike, so that nothing else divides the text.
    context.key_cache.fill_(1.0)
    scores = policy.score(context)
    best = scores.weights.topk(int(0.2 * ROWS[0].budget)).indices
    kept_idx = policy.place(context, scores)
    for layer in range(2):
        for head in range(2):
            assert set(best[layer, 0, head].tolist()) <= set(kept_idx[layer, 0, head].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recipe": "criticalkv", "coverage": 0.5},
            r"coverage=0\.5 does not fit together with selector='critical', whose order depends on "
            r"how many entries stay",
        ),
        (
            {"recipe": "tova", "selector": "critical"},
            r"selector='critical' does not fit together with scorer='tova'",
        ),
        (
            {"recipe": "tova", "allocator": "ada"},
            r"allocator='ada' does not fit together with scorer='tova', under which all kv_heads "
            r"of a layer keep the same entries",
        ),
        (
            {"recipe": "chunkkv", "allocator": "ada"},
            r"allocator='ada' does not fit together with selector='chunks'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(settings)
