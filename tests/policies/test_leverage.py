# SPDX-License-Identifier: Apache-2.0
"""Leverage of keys, and RoPE undone, against what a few plain lines say."""

import pytest
import torch
from policies.contexts import BLOCK_SIZE, NUM_KV_HEADS, NUM_LAYERS, ROTATION, Row, build_context

from ems_vllm.policies import context as context_module
from ems_vllm.policies.leverage import key_leverage
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
    whole = key_leverage(context)
    for row in torch.nonzero(context.is_untouched).flatten().tolist():
        for layer in range(NUM_LAYERS):
            for head in range(NUM_KV_HEADS):
                expected = expected_leverage(context, row, layer, head)
                got = whole[layer, row, head, : len(expected)]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # A few blocks at a time.
    monkeypatch.setattr(context_module, "SLICE_BYTES", 3 * BLOCK_SIZE * 16 * 2 * 70)
    is_entry = context.is_entry.expand_as(whole) & context.is_untouched[:, None, None]
    torch.testing.assert_close(key_leverage(context)[is_entry], whole[is_entry])


def test_a_key_like_no_other_has_the_most():
    context = build_context(ROWS[:1])
    block, slot = int(context.block_table[0, 3]), 5
    # All others lie in a plane through their mean, this one does not.
    context.key_cache[..., 2:] = 0
    context.key_cache[0, block, :, slot, 9] = 0.5
    leverage = key_leverage(context)[0, 0]
    assert (leverage.argmax(-1) == 3 * BLOCK_SIZE + slot).all()


@pytest.mark.parametrize("is_neox", [True, False])
def test_rope_is_undone(is_neox):
    """As vLLM turns keys, with part of the dimensions left alone."""
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

    angles = torch.outer(torch.arange(30.0), 100.0 ** -torch.linspace(0, 1, 6))
    keys, positions = torch.randn(12, 3, 16), slice(8, 20)
    turned = ApplyRotaryEmb.forward_static(
        keys[..., :12], angles[positions].cos(), angles[positions].sin(), is_neox
    )
    assert not torch.allclose(turned, keys[..., :12])
    rotation = Rotation(torch.cat([angles.cos(), angles.sin()], dim=1), is_neox)
    stored = torch.cat([turned, keys[..., 12:]], dim=-1).transpose(0, 1)
    torch.testing.assert_close(rotation.undo(stored, positions), keys.transpose(0, 1))
    # The last column may reach beyond the longest sequence that there can be.
    beyond = rotation.undo(stored, slice(22, 34))
    assert beyond.isfinite().all()
    assert (beyond[:, 8:] == 0).all()
