# SPDX-License-Identifier: Apache-2.0
"""Models that mix attention kinds: sliding-window layers stay as they are, full ones compress."""

import shutil

import pytest
import torch
from engine.harness import LLAMA, engine, tokens

PROMPTS = [tokens(length, seed=length) for length in (5, 300, 900, 64)]
MAX_TOKENS = 60


def settings(budget: int, recipe: str = "ems") -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": budget,
        "recent_window": 32,
        "recompress_interval": 64,
        "min_blocks_saved": 1,
    }


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny Gemma-3-like model: two sliding-window layers, then a full one, twice."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=64,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Gemma3ForCausalLM(config).float().eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{LLAMA}/{name}", folder)
    return str(folder)


def test_unlimited_budget_is_identical_to_plain_vllm(gemma):
    with engine(None, gemma, max_model_len=2048) as probe:
        expected = [probe.generate(PROMPTS, MAX_TOKENS) for _ in range(2)]
    with engine(settings(4096), gemma, max_model_len=2048) as probe:
        assert [probe.generate(PROMPTS, MAX_TOKENS) for _ in range(2)] == expected
        assert probe.stats()["num_compactions"] == 0


def test_only_full_attention_layers_are_compressed(gemma):
    with engine(settings(64, "knorm"), gemma, max_model_len=2048) as probe:
        answers = probe.generate(PROMPTS, MAX_TOKENS)
        again = probe.generate(PROMPTS, MAX_TOKENS)
        stats = probe.stats()
        assert stats["num_layers"] == 2
        assert stats["num_compactions"] >= 4
        assert [type(manager).__name__ for manager in probe.managers].count(
            "CompressedAttentionManager"
        ) == 1
        probe.assert_pool_is_empty()
    with engine(
        settings(64, "knorm"), gemma, max_model_len=2048, enable_prefix_caching=False
    ) as off:
        assert off.generate(PROMPTS, MAX_TOKENS) == answers == again
