# SPDX-License-Identifier: Apache-2.0
"""Scores of keys, and RoPE undone, against what a few plain lines say."""

from dataclasses import replace

import pytest
import torch
from policies.contexts import (
    BLOCK_SIZE,
    NUM_KV_HEADS,
    NUM_LAYERS,
    ROTATION,
    Row,
    build_context,
)
from torch.nn.functional import normalize

from ems_vllm.ops.rope import turned_back
from ems_vllm.policies import key_scores as module
from ems_vllm.policies.key_scores import key_scores
from ems_vllm.policies.rotation import Rotation

ROWS = [Row(64, 8, 32), Row(40, 8, 16, seed=1), Row(72, 8, 24, num_represented=5, seed=2)]


def stored_keys(context, row, layer, head):
    table = context.block_table[row].long()
    keys = context.key_cache[layer, table, head].flatten(0, 1)
    return keys[: int(context.num_entries[row])]


def expected_leverage(context, row, layer, head):
    keys = stored_keys(context, row, layer, head).double()
    half = ROTATION.cos_sin.shape[1] // 2
    cos, sin = ROTATION.cos_sin[: len(keys)].double().chunk(2, dim=1)
    first, second = keys[:, :half].clone(), keys[:, half : 2 * half].clone()
    keys[:, :half] = cos * first + sin * second
    keys[:, half : 2 * half] = cos * second - sin * first
    keys = keys - keys.mean(0)
    gram = keys.T @ keys
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    return (keys @ gram.inverse() * keys).sum(1).float()


def test_leverage_is_that_of_centred_keys_before_rope(monkeypatch):
    context = build_context(ROWS)
    whole = key_scores(context).leverage
    for row in torch.nonzero(context.is_untouched).flatten().tolist():
        for layer in range(NUM_LAYERS):
            for head in range(NUM_KV_HEADS):
                expected = expected_leverage(context, row, layer, head)
                got = whole[layer, row, head, : len(expected)]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # A layer and a row at a time.
    monkeypatch.setattr(module, "SLICE_BYTES", 1)
    found = key_scores(context).leverage
    assert torch.equal(found, whole)


def test_layers_that_turn_keys_in_other_ways():
    """One after the other, each by its own angles, or by none."""
    context = build_context(ROWS[:2])
    other = Rotation(ROTATION.cos_sin[:, :4].contiguous(), is_neox=False)
    both = replace(context, rotations=[other, None])
    found = key_scores(both).leverage
    for layer, rotation in enumerate(both.rotations):
        alone = key_scores(replace(context, rotations=[rotation] * NUM_LAYERS)).leverage
        assert torch.equal(found[layer], alone[layer])
    assert torch.equal(found[1], key_scores(replace(context, rotations=())).leverage[1])


def test_distinctness_is_one_minus_the_cosine_with_the_mean_direction():
    context = build_context(ROWS)
    scores = key_scores(context, with_leverage=False)
    assert scores.leverage is None
    assert torch.equal(scores.distinctness, key_scores(context).distinctness)
    for row in range(len(ROWS)):
        for layer in range(NUM_LAYERS):
            for head in range(NUM_KV_HEADS):
                units = normalize(stored_keys(context, row, layer, head).double(), dim=-1)
                expected = 1 - units @ normalize(units.mean(0), dim=0)
                got = scores.distinctness[layer, row, head]
                torch.testing.assert_close(got[: len(units)], expected.float())
                assert (got[len(units) :] == 0).all()


def test_keys_that_are_all_the_same_have_no_leverage():
    context = build_context(ROWS[:1])
    context.key_cache.fill_(0.5)
    scores = key_scores(replace(context, rotations=()))
    assert (scores.leverage == 0).all()
    assert scores.distinctness.max() < 1e-6


def test_a_key_like_no_other_has_the_most():
    context = build_context(ROWS[:1])
    block, slot = int(context.block_table[0, 3]), 5
    # All others lie in a plane through their mean, this one does not.
    context.key_cache[..., 2:] = 0
    context.key_cache[0, block, :, slot, 9] = 0.5
    leverage = key_scores(context).leverage[0, 0]
    assert (leverage.argmax(-1) == 3 * BLOCK_SIZE + slot).all()


@pytest.mark.parametrize("is_neox", [True, False])
def test_rope_is_undone(is_neox):
    """As vLLM turns keys, with part of the dimensions left alone."""
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

    angles = torch.outer(torch.arange(30.0), 100.0 ** -torch.linspace(0, 1, 6))
    keys = torch.randn(30, 3, 16)
    turned = ApplyRotaryEmb.forward_static(keys[..., :12], angles.cos(), angles.sin(), is_neox)
    assert not torch.allclose(turned, keys[..., :12])
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    stored = torch.cat([turned, keys[..., 12:]], dim=-1).transpose(0, 1)
    torch.testing.assert_close(turned_back(stored, table, is_neox), keys.transpose(0, 1))
    # A sequence may reach beyond the table.
    beyond = turned_back(stored, table[:22], is_neox)
    torch.testing.assert_close(beyond[:, :22], keys[:22].transpose(0, 1))
    assert torch.equal(beyond[:, 22:], stored[:, 22:])
