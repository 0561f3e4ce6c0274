# SPDX-License-Identifier: Apache-2.0
"""Scorers that look at recorded queries one by one, against their formulas, head by head."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from policies.contexts import GROUP, HEAD_SIZE, ROTATION, WINDOW, build_context, entries
from policies.test_scorers import ROWS, each_head, mean_of_neighbours
from torch.nn.functional import cosine_similarity

from ems_vllm.config import load_config
from ems_vllm.policies import context as contexts
from ems_vllm.policies import reading

HALF = HEAD_SIZE // 4  # Pairs of dimensions that turn: half of the dimensions do.


@pytest.fixture(params=["at once", "in steps"])
def score(request):
    """Scores by a recipe; also where only a few entries of one layer and row are read at a time."""

    def of(settings):
        context = build_context(ROWS)
        scorer = load_config(settings).scorer
        if request.param == "at once":
            return context, scorer.score(context).weights
        with mock.patch.object(reading, "SLICE_BYTES", 1 << 14):
            return context, scorer.score(context).weights

    return of


def head_entries(context, row, layer, kv_head):
    """Live keys and values, and how many of them may be chosen."""
    keys, values = (
        entries(cache, context, row)[layer, kv_head]
        for cache in (context.key_cache, context.value_cache)
    )
    return keys.double(), values.double(), int(context.num_entries[row])


def recorded(context, row, layer, kv_head):
    """[num_queries, GROUP, head_size], the newest first."""
    end = int(context.end_positions[row])
    slots = [(end - 1 - age) % WINDOW for age in range(int(context.num_queries[row]))]
    queries = context.query_ring[layer, row, slots]
    return queries[:, kv_head * GROUP : (kv_head + 1) * GROUP].double()


def logits(context, row, layer, kv_head):
    """[num_queries, GROUP, num_live], -inf of what a query does not see."""
    keys, _, _ = head_entries(context, row, layer, kv_head)
    found = recorded(context, row, layer, kv_head) @ keys.T * context.scale
    for age, of_query in enumerate(found):
        of_query[:, len(keys) - age :] = -torch.inf
    return found


def assert_scores(weights, row, layer, head, expected, **tolerance):
    got = weights[layer, row, head]
    tolerance = tolerance or {"rtol": 2e-4, "atol": 1e-6}
    torch.testing.assert_close(got[: len(expected)].double(), expected, **tolerance)
    assert (got[len(expected) :] == 0).all()


def test_tova_is_the_newest_querys_attention_in_the_mean_of_all_heads(score):
    context, weights = score("tova")
    for row in range(len(ROWS)):
        for layer in range(2):
            newest = [logits(context, row, layer, head)[0].softmax(-1) for head in range(2)]
            expected = torch.cat(newest).mean(0)[: int(context.num_entries[row])]
            for head in range(2):
                assert_scores(weights, row, layer, head, expected)


def test_compresskv_is_the_attention_of_the_best_heads_of_a_layer(score):
    heads = {0: (2, 0, 1, 3), 1: (3, 1, 0, 2)}
    profile = {"ratios": (0.5,), "fractions": {0: (0.5,), 1: (0.5,)}, "query_heads": heads}
    options = {"profile": profile, "num_heads": 2, "kernel_size": 3}
    context, weights = score({"recipe": "compresskv", "scorer": options})
    for row in range(len(ROWS)):
        num_entries = int(context.num_entries[row])
        for layer in range(2):
            of_heads = torch.cat(
                [logits(context, row, layer, head).softmax(-1).sum(0) for head in range(2)]
            )
            # In the mean of both kv_heads, as the others are.
            chosen = sum(of_heads[head] for head in heads[layer][:2]) / 2
            expected = mean_of_neighbours(chosen[:num_entries], 3)
            for head in range(2):
                assert_scores(weights, row, layer, head, expected)


def test_cake_is_mean_and_variance_of_attention(score):
    context, weights = score({"recipe": "cake", "scorer": {"gamma": 30.0, "kernel_size": 3}})
    for row, layer, head in each_head():
        _, _, num_entries = head_entries(context, row, layer, head)
        attention = logits(context, row, layer, head).softmax(-1)[..., :num_entries]
        of_heads = attention.mean(0) + 30.0 * attention.var(0)
        expected = mean_of_neighbours(of_heads.mean(0), 3)
        assert_scores(weights, row, layer, head, expected)


def test_dropkv_is_what_outputs_change_by_without_an_entry(score):
    context, weights = score({"recipe": "dropkv", "scorer": {"kernel_size": 1}})
    for row, layer, head in each_head():
        _, values, num_entries = head_entries(context, row, layer, head)
        attention = logits(context, row, layer, head).softmax(-1)
        expected = torch.zeros(num_entries, dtype=torch.double)
        for entry in range(num_entries):
            without = attention.clone()
            without[..., entry] = 0
            without /= without.sum(-1, keepdim=True)
            change = (without - attention) @ values
            expected[entry] = change.square().sum(-1).sum(0).mean()
        assert_scores(weights, row, layer, head, expected, rtol=2e-3, atol=1e-6)


def test_expected_attention_is_the_softmax_of_mean_and_covariance(score):
    context, weights = score({"recipe": "expected_attention", "scorer": {"num_future": 8}})
    for row, layer, head in each_head():
        keys, values, num_entries = head_entries(context, row, layer, head)
        num_sinks, end = int(context.num_protected[row]), int(context.end_positions[row])
        queries = recorded(context, row, layer, head)
        positions = torch.arange(end - 1, end - 1 - len(queries), -1)
        before = torch.stack(
            [turn(q, -position) for q, position in zip(queries, positions, strict=True)]
        )
        rotation = torch.stack([rotation_matrix(end + step) for step in range(8)]).mean(0)
        total = torch.zeros(num_entries, dtype=torch.double)
        for of_head in before.unbind(1):
            mean = rotation @ of_head.mean(0)
            centred = of_head - of_head.mean(0)
            covariance = rotation @ (centred.T @ centred / len(of_head)) @ rotation.T
            found = keys[:num_entries] @ mean * context.scale
            found += ((keys @ covariance) * keys).sum(-1)[:num_entries] * context.scale**2 / 2
            found[:num_sinks] = -torch.inf
            total += found.softmax(0) / GROUP
        expected = total * values[:num_entries].norm(dim=-1)
        assert_scores(weights, row, layer, head, expected)


def test_rkv_is_attention_less_redundancy(score):
    options = {"attention_weight": 0.3, "similar": 0.3, "kernel_size": 3}
    context, weights = score({"recipe": "rkv", "scorer": options})
    for row, layer, head in each_head():
        keys, _, num_entries = head_entries(context, row, layer, head)
        of_group = logits(context, row, layer, head).amax(1)[:, :num_entries]
        attention = of_group.softmax(-1).mean(0)
        peaks = torch.stack([attention[max(0, i - 1) : i + 2].max() for i in range(num_entries)])
        keys = keys[:num_entries]
        cosines = cosine_similarity(keys[:, None], keys[None], dim=-1)
        cosines.fill_diagonal_(0.0)
        for of_key in cosines:
            similar = (of_key > 0.3).nonzero().flatten()
            if len(similar):
                of_key[similar[-1]] = 0.0
        redundancy = cosines.mean(0).softmax(0)
        score_of = 0.3 * peaks - 0.7 * redundancy
        expected = score_of + 0.7 * redundancy.max()
        assert_scores(weights, row, layer, head, expected)


def test_rkv_compares_keys_within_a_span():
    rows = (ROWS[0],)
    context = build_context(rows)
    scorer = load_config({"recipe": "rkv", "scorer": {"span": 16, "attention_weight": 0.0}}).scorer
    before = scorer.score(context).weights
    other = build_context(rows)
    # The last run of 16 of the 64 entries.
    last = other.block_table[0, 6:8].long()
    other.key_cache[:, last] = other.key_cache[:, last].flip(-1)
    after = scorer.score(other).weights
    # Redundancy is a softmax: within another run, differences stay in proportion.
    first, second = (found[..., 1:47] - found[..., :1] for found in (before, after))
    ratio = first.abs().sum(-1, keepdim=True) / second.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(second * ratio, first, rtol=1e-3, atol=1e-7)


def test_triattention_is_the_mean_logit_at_distances_to_come(score):
    context, weights = score({"recipe": "triattention", "scorer": {"num_offsets": 5}})
    for row, layer, head in each_head():
        keys, _, num_entries = head_entries(context, row, layer, head)
        end = int(context.end_positions[row])
        queries = recorded(context, row, layer, head)
        positions = torch.arange(end - 1, end - 1 - len(queries), -1)
        before = torch.stack(
            [turn(q, -position) for q, position in zip(queries, positions, strict=True)]
        )
        of_heads = []
        for of_head in before.unbind(1):
            mean = of_head.mean(0)
            at = [turn(mean, end + 2**step) for step in range(5)]
            found = keys[:num_entries] @ torch.stack(at).mean(0)
            spread = pair_lengths(of_head).mean(0) - pair_lengths(mean)
            found += pair_lengths(keys[:num_entries]) @ spread
            of_heads.append((found - found.mean()) / found.std(correction=0))
        largest = torch.stack(of_heads).amax(0)
        expected = largest - largest.min()
        assert_scores(weights, row, layer, head, expected, rtol=1e-3, atol=1e-4)


def test_slices_may_be_of_any_size():
    """The fixture above does read in steps."""
    context = build_context(ROWS)
    with mock.patch.object(reading, "SLICE_BYTES", 1 << 14):
        assert len(reading.parts(context, 200)) == 4
        assert reading.parts(context, 200)[0].step < context.max_entries
    assert contexts.SLICE_BYTES == reading.SLICE_BYTES


def rotation_matrix(position):
    """Of RoPE, [head_size, head_size]; also beyond the table."""
    matrix = torch.eye(HEAD_SIZE, dtype=torch.double)
    angles = torch.atan2(ROTATION.cos_sin[1, HALF:], ROTATION.cos_sin[1, :HALF]).double()
    # As the table has it: behind its end everything stands still.
    angles = angles * min(max(position, -511), 511)
    for pair, angle in enumerate(angles):
        one, other = pair, pair + HALF
        matrix[one, one] = matrix[other, other] = angle.cos()
        matrix[one, other], matrix[other, one] = -angle.sin(), angle.sin()
    return matrix


def turn(vector, position):
    return vector @ rotation_matrix(int(position)).T


def pair_lengths(vectors):
    return torch.hypot(vectors[..., :HALF], vectors[..., HALF : 2 * HALF])
