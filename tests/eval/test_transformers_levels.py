# SPDX-License-Identifier: Apache-2.0
"""The engine on transformers where layers share a budget: each level keeps its own number."""

from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.eval.transformers_engine.attention import IMPLEMENTATION
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.ops import reference_operators
from ems_vllm.policies.policy import Policy

pytestmark = pytest.mark.slow

NUM_LAYERS = 4
TOKENS = torch.randint(0, 128, (1200,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT, CONTINUATION = TOKENS[:600], TOKENS[600:]
PYRAMID = {"name": "pyramid", "num_levels": 2}
COMPRESSION = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 48,
    "min_blocks_saved": 1,
    "global_queries": 96,
    # Keys of a random model resemble each other little; at 0 whatever is a candidate is merged.
    "merger": {"name": "ems", "similarity_threshold": 0.0},
}


def profile(ratio, fractions, num_levels=NUM_LAYERS):
    """What each layer keeps at one ratio."""
    return {
        "name": "profile",
        "profile": {"ratios": [ratio], "fractions": {i: [f] for i, f in enumerate(fractions)}},
        "uniform_share": 0,
        "num_levels": num_levels,
    }


# The first layer, from which transformers makes its mask, keeps fewer entries than others.
INVERTED = profile(0.25, [0.05, 0.45, 0.05, 0.45], 2)
# At half of the prompt the first layer keeps all of it.
LATE = profile(0.5, [1.0, 1 / 3, 1 / 3, 1 / 3])


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=None,
        attn_implementation=IMPLEMENTATION,
    )
    return TransformersEngine(LlamaForCausalLM(config).eval())


def start(engine, allocator, prompt=PROMPT, **settings):
    config = load_config({**COMPRESSION, "allocator": allocator, **settings})
    scored = engine.scored_queries(len(prompt), config, RequestOptions())
    needed = [] if scored is None else [scored]
    prefilled = engine.prefill(prompt, config.obs_window, needed)
    return engine.request(prefilled, config, RequestOptions())


def plans(engine, allocator, prompt=PROMPT, **settings):
    config = load_config({**COMPRESSION, "allocator": allocator, **settings})
    return engine.plans(len(prompt), config, RequestOptions())


def lengths(request):
    keys, values = request.entries()
    assert [len(of_layer[0]) for of_layer in values] == [len(of_layer[0]) for of_layer in keys]
    return [len(of_layer[0]) for of_layer in keys]


def test_each_layer_keeps_what_its_level_does(engine):
    """568 tokens are 35 whole blocks; of these, layers keep 4 on the mean."""
    request = start(engine, PYRAMID, global_queries="all")
    assert request.num_live == 600
    with reference_operators():
        request.compress()
        assert lengths(request) == [40 + 7 * 16] * 2 + [40 + 1 * 16] * 2
        assert request.num_live == 40 + 4 * 16
        # At the prompt's end a layer keeps what it would if all others kept as many.
        for layers, budget in (((0, 1), 7 * 16), ((2, 3), 16)):
            alike = start(engine, "uniform", budget=budget, global_queries="all")
            alike.compress()
            for own, other in zip(request.entries(), alike.entries(), strict=True):
                for layer in layers:
                    torch.testing.assert_close(own[layer], other[layer])


def test_levels_score_by_the_same_queries(engine):
    """The first of them is what the level asks for that gives the longest hits no room."""
    by_level = [level.plan for level in plans(engine, PYRAMID)]
    assert [plan.first_scored_query() for plan in by_level] == [600 - 96, (35 - 1) * 16]
    late, *others = (level.plan for level in plans(engine, LATE, budget=288))
    assert not late.compresses_prompt
    assert late.first_scored_query() == 0
    assert {plan.first_scored_query() for plan in others} == {600 - 96}
    for allocator, budget in ((PYRAMID, 64), (LATE, 288)):
        config = load_config({**COMPRESSION, "allocator": allocator, "budget": budget})
        assert engine.scored_queries(600, config, RequestOptions()) == (600 - 96, 1)
        config = load_config({**COMPRESSION, "allocator": allocator, "recipe": "knorm"})
        assert engine.scored_queries(600, config, RequestOptions()) is None
    # Nobody compresses.
    config = load_config({**COMPRESSION, "allocator": PYRAMID, "budget": 1024})
    assert engine.scored_queries(600, config, RequestOptions()) is None


@pytest.mark.parametrize("num_levels", [1, 2, 4])
@pytest.mark.parametrize("recipe", ["ems", "snapkv"])
def test_equal_shares_are_uniform_bit_for_bit(engine, recipe, num_levels):
    equal = profile(0.5, [0.5] * NUM_LAYERS, num_levels)
    assert len(plans(engine, equal)) == num_levels
    one, other = (start(engine, each, recipe=recipe) for each in ("uniform", equal))
    with reference_operators():
        assert torch.equal(one.extend(CONTINUATION[:100]), other.extend(CONTINUATION[:100]))
    assert lengths(one) == lengths(other)
    assert max(lengths(one)) < 64 + 32 + 48 + 16
    for own, its in zip(one.entries(), other.entries(), strict=True):
        assert all(map(torch.equal, own, its))


def test_levels_that_keep_everything_are_uniform_bit_for_bit(engine):
    requests = [start(engine, each, budget=1024) for each in ("uniform", PYRAMID, INVERTED)]
    expected, *others = (request.extend(CONTINUATION[:60]) for request in requests)
    assert all(torch.equal(logits, expected) for logits in others)
    assert all(lengths(request) == [660] * NUM_LAYERS for request in requests)


@pytest.mark.parametrize("allocator", [PYRAMID, INVERTED], ids=["pyramid", "inverted"])
def test_many_tokens_at_once_are_the_same_as_one_after_the_other(engine, allocator):
    """Across compactions, with masks of layers that hold more and fewer entries than the first."""
    slow, fast = (start(engine, allocator) for _ in range(2))
    fed = CONTINUATION[:130]
    with reference_operators():
        expected = torch.stack([slow.step(token) for token in fed])
        actual = torch.cat([fast.extend(fed[:37]), fast.extend(fed[37:])])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert lengths(fast) == lengths(slow)
    assert len(set(lengths(fast))) == 2


def test_each_level_is_compressed_again_while_decoding(engine):
    request = start(engine, PYRAMID)
    with reference_operators():
        for count in range(24, 600, 24):
            request.extend(CONTINUATION[count - 24 : count])
            # The newest token has not been looked at: what falls due now comes with the next one.
            expected = [0] * NUM_LAYERS
            for level in plans(engine, PYRAMID):
                first, _ = level.plan.columns(600 + count - 1)
                for layer in level.layers:
                    expected[layer] = 600 + count - 16 * first
            assert lengths(request) == expected
            assert request.num_live == sum(expected) / NUM_LAYERS
    assert max(lengths(request)) <= 7 * 16 + 32 + 48 + 16


def test_a_level_that_keeps_the_prompt_is_compressed_later(engine):
    """As a prompt too short to be compressed is: without scores of it, for all tokens so far."""
    seen = []
    compact = Policy.compact

    def recording(self, context):
        seen.append(
            (
                context.num_layers,
                int(context.end_positions),
                int(context.num_scored),
                int(context.num_represented),
                bool(context.is_untouched),
            )
        )
        compact(self, context)

    prompt = PROMPT[:150]
    settings = {"budget": 64, "global_queries": "all"}
    # Of 7 blocks of the prompt the first layer keeps all, the others 3.
    late, *others = plans(engine, LATE, prompt, **settings)
    assert [level.plan.budget_blocks for level in (late, *others)] == [7, 3, 3, 3]
    due = late.plan.next_compaction(150)
    assert due > others[0].plan.next_compaction(150) > 150
    request = start(engine, LATE, prompt, **settings)
    with mock.patch.object(Policy, "compact", recording), reference_operators():
        request.extend(CONTINUATION[:1])
        assert lengths(request) == [151, *[151 - 4 * 16] * 3]
        assert seen == [(1, 150, 112, 0, True)] * 3
        assert request.next_compaction() == others[0].plan.next_compaction(150)
        request.extend(CONTINUATION[1 : due - 150])
        assert lengths(request)[0] == due
        seen.clear()
        request.extend(CONTINUATION[due - 150 : due - 149])
    assert lengths(request)[0] == due + 1 - 16 * late.plan.columns(due)[0] < due
    assert seen[0] == (1, due, 0, due, True)
    assert [(end, untouched) for _, end, _, _, untouched in seen[1:]] == [(due, False)] * 3


def test_a_layer_without_a_share_is_refused(engine):
    three = profile(0.5, [0.5] * 3)
    with pytest.raises(
        ConfigError,
        match=r"allocator='profile' is not allowed: it deals nothing to layer 3, which is "
        r"compressed; use allocator uniform, or a profile of this model\.",
    ):
        start(engine, three)
