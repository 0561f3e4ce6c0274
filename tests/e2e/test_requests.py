# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for through `vllm_xargs`, and how a wrong wish is answered."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from e2e.clients import blocks_held, client_of, complete, greedy, prompt, wait_until_idle
from openai import BadRequestError, OpenAI

from ems_vllm.eval.server.process import Server

OFF = {"kv_compression": "off"}
LONG = prompt(1500, seed=11)
BLOCK_SIZE = 16
# Settings of the `server` fixture; the recent window is the default.
BUDGET, RECENT_WINDOW = 128, 64


@pytest.fixture(scope="module")
def dense_answers(start_server: Any) -> Iterator[list[str]]:
    """Answers of vLLM alone to a prompt too short to compress and to a long one."""
    with start_server("random-llama") as dense:
        return [complete(dense, tokens, 48) for tokens in (prompt(200, seed=12), LONG)]


def test_off_answers_like_vllm_alone(server: Server, dense_answers: list[str]) -> None:
    assert [complete(server, t, 48, OFF) for t in (prompt(200, seed=12), LONG)] == dense_answers


def test_budget_beyond_the_length_answers_like_vllm_alone(
    server: Server, dense_answers: list[str]
) -> None:
    assert complete(server, prompt(200, seed=12), 48) == dense_answers[0]


def test_compression_shows(server: Server, dense_answers: list[str]) -> None:
    """The control of the tests above: with these settings an answer can differ."""
    assert complete(server, LONG, 48) != dense_answers[1]


@pytest.mark.parametrize(
    ("xargs", "budget"),
    [
        pytest.param({}, BUDGET, id="server's budget"),
        pytest.param({"kv_compression": "on"}, BUDGET, id="on"),
        pytest.param({"kv_budget": BUDGET}, BUDGET, id="the ceiling itself"),
        pytest.param({"kv_budget": 32}, 32, id="smaller budget"),
        pytest.param({"kv_ratio": 0.04}, 60, id="ratio"),
        pytest.param({"kv_ratio": 0.9}, BUDGET, id="ratio above the server's budget"),
    ],
)
def test_blocks_follow_the_request(server: Server, xargs: dict[str, Any], budget: int) -> None:
    held, generated = blocks_held(server, LONG, xargs)
    # The prompt was compressed up to the last column before the recent window.
    tail = (len(LONG) - RECENT_WINDOW) // BLOCK_SIZE
    expected = -(-budget // BLOCK_SIZE) + (len(LONG) + generated) // BLOCK_SIZE + 1 - tail
    # The figures may be a step apart, and a step may begin a column.
    assert abs(held - expected) <= 1


def test_off_holds_everything(server: Server) -> None:
    held, generated = blocks_held(server, LONG, OFF)
    assert held >= (len(LONG) + generated) // BLOCK_SIZE


@pytest.mark.parametrize(
    ("xargs", "key_and_value", "remedy"),
    [
        pytest.param(
            {"kv_budget": 129}, "kv_budget=129", "this server keeps at most 128", id="above ceiling"
        ),
        pytest.param({"kv_budget": 0}, "kv_budget=0", "at least 1", id="budget of nothing"),
        pytest.param({"kv_budget": "many"}, "kv_budget='many'", "a whole number", id="wrong type"),
        pytest.param({"kv_budget": 1.5}, "kv_budget=1.5", "a whole number", id="fractional budget"),
        pytest.param({"kv_ratio": 1.5}, "kv_ratio=1.5", "between 0 and 1", id="ratio above 1"),
        pytest.param(
            {"kv_bugdet": 64},
            "kv_bugdet=64",
            "use 'kv_budget'",
            id="typing error",
        ),
        pytest.param(
            {"kv_compression": "snapkv"},
            "kv_compression='snapkv'",
            "use 'on' or 'off'",
            id="another method",
        ),
        pytest.param(
            {"kv_budget": 64, "kv_ratio": 0.1}, "kv_budget=64", "send one of them", id="both sizes"
        ),
        pytest.param(
            {"kv_compression": "off", "kv_budget": 64},
            "kv_budget=64",
            "send one of them",
            id="off with a size",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_wrong_wish_is_a_400(
    server: Server,
    client: OpenAI,
    xargs: dict[str, Any],
    key_and_value: str,
    remedy: str,
    stream: bool,
) -> None:
    with pytest.raises(BadRequestError) as error:
        client.completions.create(
            prompt=prompt(300, seed=13), stream=stream, **greedy(server, 4, xargs)
        )
    assert error.value.status_code == 400
    message = error.value.body["message"]
    assert f"vllm_xargs.{key_and_value}" in message
    assert remedy in message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_is_checked_too(server: Server, client: OpenAI, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    arguments = greedy(server, 4, {"kv_bugdet": 64})
    with pytest.raises(BadRequestError, match="kv_bugdet=64"):
        client.chat.completions.create(messages=messages, stream=stream, **arguments)


@pytest.mark.parametrize(
    "extra",
    [{}, {"stream": True}, {"background": True, "store": True}],
    ids=["whole", "streamed", "in the background"],
)
def test_responses_are_checked_while_they_can_be_a_400(
    server: Server, client: OpenAI, extra: dict[str, bool]
) -> None:
    with pytest.raises(BadRequestError, match="kv_bugdet=64 is not a setting: use 'kv_budget'"):
        client.responses.create(
            model=greedy(server, 4)["model"],
            input="Hello",
            max_output_tokens=2,
            extra_body={"vllm_xargs": {"kv_bugdet": 64}},
            **extra,
        )


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"kv_bugdet": 64}, "kv_bugdet=64 is not a setting"),
        ({}, "use_beam_search=True cannot be combined with kv_compression='ems'"),
    ],
    ids=["typing error", "compressed"],
)
def test_beams_are_refused_rather_than_left_uncompressed(
    server: Server, client: OpenAI, xargs: dict[str, Any], message: str
) -> None:
    arguments = {**greedy(server, 4), "n": 2}
    beams = {**arguments.pop("extra_body"), "use_beam_search": True, "vllm_xargs": xargs}
    tokens, messages = prompt(40, seed=15), [{"role": "user", "content": "Hello"}]
    with pytest.raises(BadRequestError, match=message):
        client.completions.create(prompt=tokens, extra_body=beams, **arguments)
    with pytest.raises(BadRequestError, match=message):
        client.chat.completions.create(messages=messages, extra_body=beams, **arguments)


def test_beams_that_opt_out_are_answered(server: Server, client: OpenAI) -> None:
    arguments = {**greedy(server, 4), "n": 2}
    beams = {**arguments.pop("extra_body"), "use_beam_search": True, "vllm_xargs": OFF}
    tokens = prompt(40, seed=15)
    answer = client.completions.create(prompt=tokens, extra_body=beams, **arguments)
    assert len(answer.choices) == 2


def test_generative_scoring_is_checked_too(server: Server, client: OpenAI) -> None:
    url = str(client.base_url.join("/generative_scoring"))
    body = {"query": "Is it", "items": ["red", "blue"], "label_token_ids": [400, 401]}
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    answer = httpx.post(url, json={**body, "vllm_xargs": {"kv_bugdet": 64}}, timeout=60)
    assert answer.status_code == 400
    assert "kv_bugdet=64" in answer.text


def test_other_extensions_arguments_pass(server: Server) -> None:
    others = {"temperature_of_mine": 1, "kv_cache_report_mode": "full"}
    assert complete(server, prompt(30, seed=14), 4, others)


def test_server_answers_after_refusals(server: Server) -> None:
    with pytest.raises(BadRequestError):
        client_of(server).completions.create(prompt=LONG, **greedy(server, 4, {"kv_budget": 4096}))
    assert complete(server, LONG, 4)
    assert wait_until_idle(server).num_used_blocks == 0


def test_a_chat_protects_roles(server: Server, client: OpenAI, chapter: str) -> None:
    """Found through the model's own template, and refused with the arithmetic."""
    system = {"role": "system", "content": "Answer in verse, and never mention the sea."}
    messages = [system, {"role": "user", "content": chapter[:2500]}]

    def ask(messages: list[Any], xargs: dict[str, Any], num_tokens: int = 48) -> str | None:
        arguments = greedy(server, num_tokens, xargs)
        answer = client.chat.completions.create(messages=messages, **arguments)
        return answer.choices[0].message.content

    def num_tokens(messages: list[Any]) -> int:
        body = {"model": server.model, "messages": messages, "add_generation_prompt": False}
        return int(httpx.post(f"{server.url}/tokenize", json=body).json()["count"])

    count = num_tokens([system])
    assert 4 < count < 100
    found = ask(messages, {"kv_protect": ["system"]})
    # What comes behind the system message may begin with a letter that belongs to its last token.
    ranges = [{"kv_protect": [f"0-{stop}"]} for stop in (count - 1, count)]
    assert found in [ask(messages, xargs) for xargs in ranges]
    assert found != ask(messages, {})
    with pytest.raises(BadRequestError, match=r"last_user'\] is not allowed: it covers \d+ tokens"):
        ask(messages, {"kv_protect": "last_user"})
    with pytest.raises(BadRequestError, match="'tools' is not in the conversation"):
        ask(messages, {"kv_protect": "tools"})
    with pytest.raises(BadRequestError, match="'system' is not in the conversation"):
        ask(messages[1:], {"kv_protect": "system"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_protects_ranges_only(server: Server, client: OpenAI, stream: bool) -> None:
    create = client.completions.create
    for value, match in (
        ("system", "system can be found in chat completions only"),
        ("0-1501", "the prompt has 1500 tokens"),
        (
            "100-300",
            "covers 200 tokens of what is compressed, which with 4 sinks makes 204, and 128",
        ),
    ):
        with pytest.raises(BadRequestError, match=match):
            create(prompt=LONG, stream=stream, **greedy(server, 8, {"kv_protect": value}))
    assert complete(server, LONG, 48, {"kv_protect": "700-800"}) != complete(server, LONG, 48)
