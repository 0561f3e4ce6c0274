# SPDX-License-Identifier: Apache-2.0
"""Each scorer against its formula, written out head by head."""

import pytest
import torch
from policies.contexts import (
    BLOCK_SIZE,
    GROUP,
    NUM_KV_HEADS,
    NUM_LAYERS,
    WINDOW,
    Row,
    build_context,
    entries,
)
from torch.nn.functional import cosine_similarity

from ems_vllm.config import ConfigError, load_config
from ems_vllm.policies.key_scores import key_scores

FACTORS = (0.0, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0)
ROWS = (
    Row(num_entries=64, tail=9, budget=24, seed=1),
    Row(num_entries=40, tail=3, budget=32, num_scored=24, num_represented=25, seed=2),
)


def window_attention(context, row, layer, kv_head, peak=False):
    """[num_entries]: softmax attention of the recorded queries, summed; mean over the group.

    With `peak` the most that one of them pays, in one query head.
    """
    keys = entries(context.key_cache, context, row)[layer, kv_head]
    num_queries, end = int(context.num_queries[row]), int(context.end_positions[row])
    total, most = torch.zeros(len(keys)), torch.zeros(len(keys))
    for age in range(num_queries):
        queries = context.query_ring[layer, row, (end - 1 - age) % WINDOW]
        for query in queries[kv_head * GROUP : (kv_head + 1) * GROUP]:
            logits = keys @ query * context.scale
            logits[len(keys) - age :] = -torch.inf
            attention = logits.softmax(0)
            total += attention / GROUP
            most = torch.maximum(most, attention)
    return (most if peak else total)[: int(context.num_entries[row])]


def accumulated(context, row, layer, kv_head):
    values = entries(context.accumulated_pages, context, row)[layer, kv_head].clone()
    values = values[: int(context.num_entries[row])]
    values[int(context.num_scored[row]) :] = 0
    return values


def accumulated_so_far(context, row, layer, kv_head):
    """[num_entries]: of the prompt, and of the recorded queries times those they stand for."""
    window = window_attention(context, row, layer, kv_head)
    share = int(context.num_represented[row]) / int(context.num_queries[row])
    return accumulated(context, row, layer, kv_head) + share * window


def each_head():
    for row in range(len(ROWS)):
        for layer in range(NUM_LAYERS):
            for kv_head in range(NUM_KV_HEADS):
                yield row, layer, kv_head


def score(recipe):
    context = build_context(ROWS)
    return context, load_config(recipe).scorer.score(context)


def in_deviations(values, num_sinks):
    return values / values[num_sinks:].std(correction=0)


def mean_of_neighbours(values, width):
    half = width // 2
    return torch.stack([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def forward_maximum(values, width):
    return torch.stack([values[max(0, i + 1 - width) : i + 1].max() for i in range(len(values))])


def test_ems_by_means_is_the_mean_aligned_maximum_of_an_entry_and_those_before():
    context, scores = score({"recipe": "ems", "scorer": {"alignment": "mean"}})
    for row, layer, head in each_head():
        window = window_attention(context, row, layer, head)
        carry = accumulated_so_far(context, row, layer, head)
        aligned = torch.maximum(carry * window.mean() / carry.mean(), window)
        expected = forward_maximum(aligned, 13)
        got = scores.weights[layer, row, head, : len(expected)]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores.carry[layer, row, head, : len(carry)], carry)


@pytest.mark.parametrize("local_by", ["peak", "sum"])
def test_ems_by_quantiles_keeps_what_each_order_claims_first(local_by):
    """Entry by entry: the budget at which the first of the three orders wants it."""
    options = {"local_share": 0.5, "key_share": 0.2, "local_first": 3, "kernel_size": 3}
    options |= {"local_by": local_by}
    options |= {"key_kernel_size": 5, "leverage_weight": 0.7}
    context, scores = score({"recipe": "ems", "scorer": options})
    for row, layer, head in each_head():
        num_sinks, num_entries = int(context.num_protected[row]), int(context.num_entries[row])
        recent = window_attention(context, row, layer, head, peak=local_by == "peak")
        keys, values = (
            entries(cache, context, row)[layer, head, :num_entries]
            for cache in (context.key_cache, context.value_cache)
        )
        norms = values.norm(dim=-1)
        units = keys / keys.norm(dim=-1, keepdim=True)
        mean = units.mean(0) / units.mean(0).norm()
        stands_out = in_deviations((1 - units @ mean) * norms, num_sinks)
        if context.is_untouched[row]:
            leverage = key_scores(context).leverage[layer, row, head, :num_entries]
            stands_out += 0.7 * in_deviations(leverage, num_sinks)
        orders = (
            (forward_maximum(recent * norms, 3), 0.5, 3),
            (accumulated_so_far(context, row, layer, head) * norms, 0.3, 0),
            (mean_of_neighbours(stands_out, 5), 0.2, 0),
        )
        claims = torch.full((num_entries,), torch.inf)
        for values, share, first in orders:
            order = num_sinks + values[num_sinks:].sort(descending=True, stable=True).indices
            for rank, entry in enumerate(order.tolist()):
                claim = rank / first if rank < first else 1 + (rank - first) / share
                claims[entry] = min(claims[entry], claim)
        got = scores.weights[layer, row, head]
        torch.testing.assert_close(got[num_sinks:num_entries], 1 / (1 + claims[num_sinks:]))
        assert (got[num_entries:] == 0).all()


@pytest.mark.parametrize("share", ["local_share", "key_share"])
def test_an_order_without_a_share_has_no_say(share):
    context = build_context(ROWS)
    both = {"local_share": 0.5, "key_share": 0.5, "local_first": 0, share: 0.0}
    without = load_config({"recipe": "ems", "scorer": both}).scorer
    changed = {"kernel_size": 1} if share == "local_share" else {"key_kernel_size": 1}
    other = load_config({"recipe": "ems", "scorer": both | changed}).scorer
    assert torch.equal(without.score(context).weights, other.score(context).weights)


def test_shares_beyond_the_whole_are_refused():
    with pytest.raises(ConfigError, match=r"local_share 0\.8 and key_share 0\.3"):
        load_config({"recipe": "ems", "scorer": {"local_share": 0.8, "key_share": 0.3}})


def test_h2o_is_the_accumulated_attention():
    context, scores = score("h2o")
    for row, layer, head in each_head():
        expected = accumulated_so_far(context, row, layer, head)
        torch.testing.assert_close(scores.weights[layer, row, head, : len(expected)], expected)


@pytest.mark.parametrize("recipe", ["ems", "h2o"])
def test_a_generated_token_counts_as_much_as_one_of_the_prompt(recipe):
    """Entries that as many queries attended to equally get the same score, wherever they are."""
    num_queries, half = 100, 32
    context = build_context([Row(64, WINDOW, 24, num_scored=half, num_represented=num_queries)])
    # Generated queries attend to the generated half alone, and to all of it alike; every query of
    # the prompt attended to the other half in the same way.
    context.query_ring.fill_(1.0)
    context.key_cache.fill_(-10.0)
    generated = context.block_table[0, half // BLOCK_SIZE : 2 * half // BLOCK_SIZE].long()
    context.key_cache[:, generated] = 10.0
    context.accumulated_pages.fill_(num_queries / half)
    carry = load_config(recipe).scorer.score(context).carry
    torch.testing.assert_close(carry, torch.full_like(carry, num_queries / half))


def test_snapkv_smooths_the_window_attention():
    context, scores = score("snapkv")
    for row, layer, head in each_head():
        window = window_attention(context, row, layer, head)
        expected = torch.stack([window[max(0, i - 2) : i + 3].mean() for i in range(len(window))])
        got = scores.weights[layer, row, head, : len(expected)]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_knorm_prefers_small_keys():
    context, scores = score("knorm")
    for row, layer, head in each_head():
        norms = entries(context.key_cache, context, row)[layer, head].norm(dim=-1)
        norms = norms[: int(context.num_entries[row])]
        got = scores.weights[layer, row, head, : len(norms)]
        assert torch.equal(got.argsort(descending=True), norms.argsort())


def test_streaming_llm_prefers_late_entries():
    _, scores = score("streaming_llm")
    assert (scores.weights[:, 0, :, 1:64] > scores.weights[:, 0, :, :63]).all()


def test_random_differs_by_head_and_seed_but_not_by_run():
    _, first = score("random")
    _, again = score("random")
    _, other = score({"recipe": "random", "scorer": {"seed": 1}})
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, other.weights)
    heads = first.weights[:, 0].flatten(0, 1)
    assert len({tuple(head.tolist()) for head in heads}) == len(heads)
    many = load_config("random").scorer.score(build_context([Row(8000, 9, 8)])).weights
    assert many.mean().item() == pytest.approx(0.5, abs=0.02)


def test_mass_keys_add_one_to_the_logits_of_recorded_queries():
    """Where queries agree, exactly; where they do not, as well as a key along their mean can."""
    context = build_context(ROWS)
    assert context.query_ring is not None
    keys = context.mass_keys()
    for row, layer, head in each_head():
        num_queries, end = int(context.num_queries[row]), int(context.end_positions[row])
        recorded = [(end - 1 - age) % WINDOW for age in range(num_queries)]
        queries = context.query_ring[layer, row, recorded]
        queries = queries[:, head * GROUP : (head + 1) * GROUP].flatten(0, 1)
        key = keys[layer, row, head]
        errors = [
            (queries @ (factor * key) * context.scale - 1).square().mean() for factor in FACTORS
        ]
        assert min(errors) == errors[FACTORS.index(1.0)]
        torch.testing.assert_close(
            cosine_similarity(key, queries.mean(0), dim=0), torch.tensor(1.0)
        )
    context.query_ring[:] = context.query_ring[:, :, :1, :1].clone()
    logits = (context.query_ring[:, :, 0, 0] * context.mass_keys()[:, :, 0]).sum(-1)
    torch.testing.assert_close(logits * context.scale, torch.ones(logits.shape))


def test_without_recorded_queries_mass_keys_are_zero():
    context = build_context(ROWS)
    context.num_queries.zero_()
    assert (context.mass_keys() == 0).all()


def test_the_weight_of_a_merge_is_attention():
    context, scores = score("ems")
    for row, layer, head in each_head():
        window = window_attention(context, row, layer, head)
        carry = accumulated_so_far(context, row, layer, head)
        expected = torch.maximum(carry * window.mean() / carry.mean(), window)
        torch.testing.assert_close(scores.mass[layer, row, head, : len(expected)], expected)
