# SPDX-License-Identifier: Apache-2.0
"""Everything a client may ask of sampling: as plain vLLM, and independent of the batch."""

from typing import Any

import pytest
from engine.harness import QWEN3, engine, tokens

pytestmark = pytest.mark.slow

LONG, SHORT = tokens(420, seed=1), tokens(30, seed=2)
OTHERS = [tokens(length, seed=length) for length in (17, 250)]
MAX_TOKENS = 48
LIMITED = {
    "recipe": "knorm",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
UNLIMITED = {"recipe": "ems", "budget": 8192}
DIGITS = r"[0-9]{6}(-[0-9]{3}){8}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [41, 42]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def structured(**constraint: Any) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    # Ends when the constraint is fulfilled.
    return {"structured_outputs": StructuredOutputsParams(**constraint), "ignore_eos": False}


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": {"temperature": 1.0, "seed": 7},
    "several choices": {"temperature": 1.0, "seed": 7, "n": 3},
    "nucleus": {"temperature": 0.8, "seed": 1, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "logit bias": {"logit_bias": {400: 6.0, 401: 5.0}},
    "allowed tokens": {"allowed_token_ids": [400, 401, 402, 403]},
    "bad words": {"bad_words": ["the", "e"]},
    "log probabilities": {"logprobs": 4},
    "prompt log probabilities": {"prompt_logprobs": 2},
    "least length": {"ignore_eos": False, "min_tokens": 40},
    "choice": structured(choice=["yes, of course", "no, never"]),
    "pattern": structured(regex=DIGITS),
    "schema": structured(json=SCHEMA),
}


def summary(output: Any) -> dict[str, Any]:
    """What a client sees of an answer."""
    return {
        "choices": [
            (list(c.token_ids), c.text, c.finish_reason, c.stop_reason, logprobs(c.logprobs))
            for c in output.outputs
        ],
        "prompt": logprobs(output.prompt_logprobs),
    }


def logprobs(positions: Any) -> Any:
    if positions is None:
        return None
    return [
        p if p is None else {token: (item.rank, item.logprob) for token, item in p.items()}
        for p in positions
    ]


def ask(probe: Any, prompts: list[list[int]], name: str) -> list[dict[str, Any]]:
    outputs = probe.generate_outputs(prompts, MAX_TOKENS, **VARIANTS[name])
    return [summary(output) for output in outputs]


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    """Answers of three engines to every variant; of the compressed one also within a batch."""
    found = {}
    with engine(None, QWEN3) as dense:
        found["dense"] = {name: ask(dense, [LONG, SHORT], name) for name in VARIANTS}
    with engine(UNLIMITED, QWEN3) as unlimited:
        found["unlimited"] = {name: ask(unlimited, [LONG, SHORT], name) for name in VARIANTS}
        assert unlimited.stats()["num_compactions"] == 0
    with engine(LIMITED, QWEN3) as limited:
        found["limited"] = {name: ask(limited, [LONG], name) for name in VARIANTS}
        before = limited.stats()["num_compactions"]
        assert before > 2 * len(VARIANTS)
        found["batched"] = {name: ask(limited, [LONG, *OTHERS], name) for name in VARIANTS}
        limited.assert_pool_is_empty()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_budget_beyond_the_length_answers_as_vllm_alone(answers, name):
    assert answers["unlimited"][name] == answers["dense"][name]


@pytest.mark.parametrize("name", VARIANTS)
def test_compressed_answer_does_not_depend_on_the_batch(answers, name):
    alone, batched = answers["limited"][name][0], answers["batched"][name][0]
    assert [c[:4] for c in batched["choices"]] == [c[:4] for c in alone["choices"]]


def test_compression_shows(answers):
    """The control of the tests above: with these settings an answer can differ."""
    assert answers["limited"]["greedy"][0] != answers["dense"]["greedy"][0]


def test_prompt_log_probabilities_are_exact_under_compression(answers):
    """The prompt is computed densely; compression begins after it."""
    name = "prompt log probabilities"
    found = answers["limited"][name][0]["prompt"]
    assert len(found) == len(LONG)
    assert found == answers["dense"][name][0]["prompt"]


def test_choices_differ(answers):
    choices = answers["limited"]["several choices"][0]["choices"]
    assert len({tuple(choice[0]) for choice in choices}) == 3


def test_constraints_hold_beyond_a_compaction(answers):
    import json
    import re

    texts = {name: answers["limited"][name][0]["choices"][0][1] for name in VARIANTS}
    assert re.fullmatch(DIGITS, texts["pattern"])
    assert texts["choice"] in ("yes, of course", "no, never")
    assert json.loads(texts["schema"]).keys() == {"name", "age"}
    assert set(answers["limited"]["allowed tokens"][0]["choices"][0][0]) <= {400, 401, 402, 403}
    assert len(answers["limited"]["least length"][0]["choices"][0][0]) >= 40
    for position in answers["limited"]["log probabilities"][0]["choices"][0][4]:
        assert len(position) == 4
        assert {rank for rank, _ in position.values()} == {1, 2, 3, 4}


def test_stops_end_an_answer_where_they_occur(answers):
    """Before and after the first recompression of the answer."""
    greedy, text = answers["limited"]["greedy"][0]["choices"][0][:2]
    with engine(LIMITED, QWEN3) as limited:
        for where in (5, 30):
            token, piece = greedy[where], text[len(text) * where // MAX_TOKENS :][:6]
            (by_token,) = limited.generate_outputs([LONG], MAX_TOKENS, stop_token_ids=[token])
            (by_text,) = limited.generate_outputs([LONG], MAX_TOKENS, stop=[piece])
            assert list(by_token.outputs[0].token_ids) == greedy[: greedy.index(token) + 1]
            assert by_token.outputs[0].stop_reason == token
            assert by_text.outputs[0].text == text[: text.index(piece)]
            assert by_text.outputs[0].stop_reason == piece
        limited.assert_pool_is_empty()


def test_beam_search_is_exact_under_compression():
    """Every step of a beam is a prompt of its own, and prompts are computed densely."""
    from vllm.sampling_params import BeamSearchParams

    found = []
    for compression in (None, LIMITED):
        with engine(compression, QWEN3) as probe:
            params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
            (output,) = probe.llm.beam_search([{"prompt_token_ids": LONG}], params)
            found.append([list(sequence.tokens) for sequence in output.sequences])
            probe.assert_pool_is_empty()
    assert found[0] == found[1]
    assert len(found[0]) == 3
