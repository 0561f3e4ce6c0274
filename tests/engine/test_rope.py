# SPDX-License-Identifier: Apache-2.0
"""A policy is told what RoPE did to the keys of the layers it compresses."""

from unittest import mock

import pytest
import torch
from engine.harness import LLAMA, engine, tokens
from engine.tiny_models import gemma3
from torch import nn
from transformers import AutoModelForCausalLM

from ems_vllm.engine.group.rope import rotations
from ems_vllm.eval.transformers_engine.cache import compressed_layers
from ems_vllm.eval.transformers_engine.rope import rotation_of
from ems_vllm.policies.policy import Policy

SETTINGS = {"recipe": "ems", "budget": 64, "recent_window": 32, "recompress_interval": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    gemma3().save_pretrained(folder)
    return {"llama": LLAMA, "gemma3": str(folder)}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_as_transformers_turns_keys(folders, kind):
    """Of Gemma 3, only layers with full attention are compressed, which turn more slowly."""
    contexts = []
    compact = Policy.compact

    def spy(self, context):
        contexts.append(context)
        compact(self, context)

    options = {"model": folders[kind], "max_model_len": 512, "skip_tokenizer_init": True}
    with mock.patch.object(Policy, "compact", spy), engine(SETTINGS, **options) as probe:
        probe.generate([tokens(300)], 100)
    model = AutoModelForCausalLM.from_pretrained(folders[kind])
    layers = compressed_layers(model.config)
    first, later = contexts[0], contexts[-1]
    assert first.is_untouched.tolist() == [True]
    assert later.is_untouched.tolist() == [False]
    assert len(first.rotations) == len(layers)
    for layer, rotation in zip(layers, first.rotations, strict=True):
        expected = rotation_of(model, layer)
        assert rotation is not None
        assert rotation.is_neox == expected.is_neox
        torch.testing.assert_close(rotation.cos_sin[:512], expected.cos_sin[:512])


def test_a_layer_without_a_rotary_embedding_has_none():
    attention = nn.Linear(2, 2)
    assert rotations(nn.Sequential(attention), [attention]) == [None]
