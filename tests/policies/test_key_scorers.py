# SPDX-License-Identifier: Apache-2.0
"""Scorers by keys, values and accumulated attention, against their formulas."""

from __future__ import annotations

import torch
from policies.contexts import Row, build_context, entries
from policies.test_scorers import accumulated_so_far, each_head, mean_of_neighbours, score
from torch.nn.functional import cosine_similarity

from ems_vllm.config import load_config
from ems_vllm.policies.key_scores import key_scores


def test_keydiff_is_how_far_a_key_is_from_the_mean_direction():
    context, scores = score("keydiff")
    for row, layer, head in each_head():
        keys = entries(context.key_cache, context, row)[layer, head]
        keys = keys[: int(context.num_entries[row])]
        mean = (keys / keys.norm(dim=-1, keepdim=True)).mean(0)
        expected = 1 - cosine_similarity(keys, mean[None], dim=-1)
        got = scores.weights[layer, row, head, : len(keys)]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compactor_blends_leverage_with_attention_in_deviations():
    options = {"blending": 0.7, "kernel_size": 5}
    context, scores = score({"recipe": "compactor", "scorer": options})
    for row, layer, head in each_head():
        num_sinks, num_entries = int(context.num_protected[row]), int(context.num_entries[row])
        values = entries(context.value_cache, context, row)[layer, head, :num_entries]
        carry = accumulated_so_far(context, row, layer, head)
        attention = mean_of_neighbours(carry * values.norm(dim=-1), 5)
        expected = attention / attention[num_sinks:].std(correction=0)
        if context.is_untouched[row]:
            leverage = key_scores(context).leverage[layer, row, head, :num_entries]
            expected = expected + 0.7 * leverage / leverage[num_sinks:].std(correction=0)
        got = scores.weights[layer, row, head, :num_entries]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.carry[layer, row, head, :num_entries], carry)


def test_lagkv_ranks_entries_by_what_comes_next():
    rows = (Row(num_entries=64, tail=9, budget=24, seed=1), Row(num_entries=16, tail=3, budget=8))
    context = build_context(rows)
    weights = load_config({"recipe": "lagkv", "scorer": {"lag": 8}}).scorer.score(context).weights
    for layer in range(2):
        for head in range(2):
            keys, values = (
                entries(cache, context, 0)[layer, head, 2:64].double()
                for cache in (context.key_cache, context.value_cache)
            )
            # 62 behind the sinks are 7 partitions of 8; the last of them and the rest stay.
            for part in range(6):
                total = torch.zeros(8, dtype=torch.double)
                for vectors in (keys, values):
                    following = vectors[8 * part + 8 : 8 * part + 16]
                    low, high = following.amin(0), following.amax(0)
                    scaled = (vectors[8 * part : 8 * part + 8] - low) / (high - low)
                    total += scaled.std(-1).softmax(0) / 2
                got = weights[layer, 0, head, 2 + 8 * part : 10 + 8 * part]
                assert got.argsort().tolist() == total.argsort().tolist()
                assert got.max() < 1
            recent = weights[layer, 0, head, 50:64]
            assert (recent >= 1).all()
            assert (recent.diff() > 0).all()
            # Too short to compare anything: the latest stay.
            assert (weights[layer, 1, head, 2:16].diff() > 0).all()
