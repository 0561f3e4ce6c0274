# SPDX-License-Identifier: Apache-2.0
"""The engine on transformers where layers differ: full ones are compressed, sliding ones not."""

from itertools import islice

import pytest
import torch
from engine import tiny_models
from engine.harness import engine, tokens
from engine.tiny_models import MAX_MODEL_LEN, SLIDING_WINDOW
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.eval.transformers_engine.answer import generated
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.ops import reference_operators

pytestmark = pytest.mark.slow

# Shorter than the window at first; compressed at the prompt's end.
PROMPTS = [tokens(length, seed=length) for length in (100, 300, 421)]
MAX_TOKENS = 56
SETTINGS = {
    "recipe": "ems",
    "budget": 32,
    "recent_window": 16,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
    "merger": {"similarity_threshold": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save(tiny_models.gemma3, tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def ours(folder):
    return TransformersEngine.load(folder, device="cpu", dtype="float32")


def start(ours, prompt, **settings):
    """A request after its prompt, and the logits there."""
    config = load_config({**SETTINGS, **settings})
    scored = ours.scored_queries(len(prompt), config, RequestOptions())
    needed = set() if scored is None else {scored}
    prefilled = ours.prefill(prompt, config.obs_window, needed)
    return ours.request(prefilled, config, RequestOptions()), prefilled.logits


def answer(ours, prompt, **settings):
    request, logits = start(ours, prompt, **settings)
    with reference_operators():
        return list(islice(generated(logits, request.step), MAX_TOKENS))


def test_without_compression_it_is_transformers(folder, ours):
    assert max(len(prompt) for prompt in PROMPTS) > 3 * SLIDING_WINDOW
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    for prompt in PROMPTS:
        input_ids = torch.tensor([prompt])
        expected = plain.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=None,
        )
        assert answer(ours, prompt, budget=2048) == expected[0, len(prompt) :].tolist()


def test_both_engines_answer_the_same(folder, ours):
    options = {"max_model_len": MAX_MODEL_LEN, "attention_backend": "TORCH_CPU"}
    with engine(SETTINGS, folder, **options) as probe:
        # One at a time: what is added up in another order may be rounded to another answer.
        expected = [probe.generate([prompt], MAX_TOKENS)[0] for prompt in PROMPTS]
        assert probe.stats()["num_compactions"] >= 3 * len(PROMPTS)
    assert [answer(ours, prompt) for prompt in PROMPTS] == expected
    # It is the compression that they agree in.
    assert answer(ours, PROMPTS[2], budget=2048) != expected[2]


@pytest.mark.parametrize("budget", [32, 2048])
def test_many_tokens_at_once_are_the_same_as_one_after_the_other(ours, budget):
    """Across windows that slide and, at the smaller budget, compactions."""
    continuation = tokens(150, seed=1)
    slow, _ = start(ours, PROMPTS[1], budget=budget)
    fast, _ = start(ours, PROMPTS[1], budget=budget)
    with reference_operators():
        expected = torch.stack([slow.step(token) for token in continuation])
        actual = torch.cat([fast.extend(continuation[:37]), fast.extend(continuation[37:])])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert fast.num_live == slow.num_live
    assert (fast.num_live < 100) == (budget == 32)


# The full-attention layers are 2 and 5; the first one keeps less.
PROFILE = {
    "name": "profile",
    "profile": {"ratios": [0.25], "fractions": {2: [0.1], 5: [0.4]}},
    "num_levels": 2,
    "uniform_share": 0,
}


def test_layers_of_a_profile_keep_other_numbers_of_entries(ours):
    continuation = tokens(150, seed=1)
    slow, _ = start(ours, PROMPTS[1], budget=64, allocator=PROFILE)
    fast, _ = start(ours, PROMPTS[1], budget=64, allocator=PROFILE)
    with reference_operators():
        expected = torch.stack([slow.step(token) for token in continuation])
        actual = torch.cat([fast.extend(continuation[:37]), fast.extend(continuation[37:])])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    less, more = (of_layer.shape[1] for of_layer in fast.entries()[0])
    # Of 17 blocks that are compressed, 2 and 6.
    assert more - less == (6 - 2) * 16
    assert fast.num_live == (less + more) / 2


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        (
            "pyramid",
            r"allocator='pyramid' is not allowed: it deals to layer 0, which is not compressed "
            r"\(sliding_attention\); use allocator uniform, or a profile of this model\.$",
        ),
        (
            {**PROFILE, "profile": {"ratios": [0.25], "fractions": {2: [0.25]}}},
            r"allocator='profile' is not allowed: it deals nothing to layer 5, which is compressed",
        ),
        (
            {**PROFILE, "profile": {"ratios": [0.25], "fractions": {6: [0.25]}}},
            r"its profile has a layer 6, but the model has 6 layers",
        ),
    ],
    ids=["sliding", "missing", "other model"],
)
def test_shares_of_other_layers_than_are_compressed_are_refused(ours, allocator, message):
    config = load_config({**SETTINGS, "allocator": allocator})
    for options in (RequestOptions(), RequestOptions(enabled=False)):
        with pytest.raises(ConfigError, match=message):
            ours.scored_queries(300, config, options)
        with pytest.raises(ConfigError, match=message):
            ours.plans(300, config, options)


def test_requests_that_share_a_prompt_do_not_disturb_each_other(ours):
    config = load_config({**SETTINGS, "global_queries": "all", "sample_stride": 1})
    prefilled = ours.prefill(PROMPTS[2], config.obs_window)
    lengths = [layer.keys.shape[2] for layer in prefilled.cache.layers]
    expected = answer(ours, PROMPTS[2], global_queries="all", sample_stride=1)
    for _ in range(2):
        request = ours.request(prefilled, config, RequestOptions())
        with reference_operators():
            token_ids = list(islice(generated(prefilled.logits, request.step), MAX_TOKENS))
        assert token_ids == expected
    assert [layer.keys.shape[2] for layer in prefilled.cache.layers] == lengths


def mistral():
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_models.gemma2, "soft-capped attention logits"),
        (tiny_models.gemma4, "layers that share the cache of others"),
        (tiny_models.gpt_oss, "an attention that transformers does not compute with torch's own"),
        (tiny_models.llama4, "layers of kind chunked_attention"),
        (tiny_models.lfm2, "layers of kind conv"),
        (mistral, "no layer but of kind sliding_attention"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_models_are_refused(build, reason):
    with pytest.raises(ConfigError, match=f"has {reason}.*serve this model with vLLM"):
        TransformersEngine(build())
