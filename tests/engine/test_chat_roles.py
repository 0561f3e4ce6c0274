# SPDX-License-Identifier: Apache-2.0
"""Which tokens a role is, for templates of several kinds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from ems_vllm.engine.frontend.chat_roles import Chat, protect_roles

TOOLS = [{"name": "look_up"}]
SYSTEM = {"role": "system", "content": "Be kind."}
FIRST = {"role": "user", "content": "Hello there"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>Hi"}
LAST = {"role": "user", "content": "And you?"}


def chatml(messages: list[Any], tools: Any) -> str:
    """Every message between marks; tools in the system message."""
    text = ""
    if tools:
        text = f"<|system|>tools: {tools}\n"
    for message in messages:
        text += f"<|{message['role']}|>{message['content']}<|end|>"
    return text


def forgetful(messages: list[Any], tools: Any) -> str:
    """What was thought before the last question is left out, as Qwen3 does; needs a question."""
    users = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError("no user query found in messages")
    text = chatml(messages[: users[-1]], tools).replace("<think>hm</think>", "")
    return text + chatml(messages[users[-1] :], None)


def without_system(messages: list[Any], tools: Any) -> str:
    if any(message["role"] == "system" for message in messages):
        raise ValueError("System role not supported")
    return chatml(messages, tools)


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def span_of(role: str, template: Any, messages: list[Any], tools: Any = None) -> str | None:
    """The text of a role."""

    async def render(messages: list[Any], tools: Any, is_whole: bool) -> list[int]:
        return ids(template(messages, tools) + ("<|assistant|>" if is_whole else ""))

    text = template(messages, tools) + "<|assistant|>"
    span = asyncio.run(Chat(messages, tools, ids(text), render).span_of(role))
    return None if span is None else text[slice(*span)]


@pytest.mark.parametrize(
    ("role", "template", "messages", "tools", "expected"),
    [
        ("system", chatml, [SYSTEM, FIRST], None, "<|system|>Be kind.<|end|><|"),
        ("system", chatml, [FIRST, ANSWER, LAST], None, None),
        ("system", forgetful, [SYSTEM, FIRST], None, "<|system|>Be kind.<|end|><|user|>"),
        (
            "system",
            forgetful,
            [SYSTEM, FIRST, ANSWER, LAST],
            None,
            "<|system|>Be kind.<|end|><|user|>",
        ),
        ("system", without_system, [FIRST], None, None),
        ("last_user", chatml, [SYSTEM, FIRST, ANSWER, LAST], None, "And you?<|end|>"),
        ("last_user", chatml, [FIRST], None, "Hello there<|end|>"),
        ("last_user", chatml, [FIRST], TOOLS, "Hello there<|end|>"),
        ("last_user", forgetful, [SYSTEM, FIRST, ANSWER, LAST], None, "And you?<|end|>"),
        ("last_user", chatml, [SYSTEM], None, None),
        ("tools", chatml, [SYSTEM, FIRST], TOOLS, "tools: [{'name': 'look_up'}]\n<|system|>"),
        ("tools", forgetful, [FIRST], TOOLS, "<|system|>tools: [{'name': 'look_up'}]\n"),
        ("tools", chatml, [SYSTEM, FIRST], None, None),
    ],
)
def test_a_role_is_found_where_the_template_puts_it(role, template, messages, tools, expected):
    found = span_of(role, template, messages, tools)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        # What both neighbours begin with may go to either.
        assert found in {expected, expected[: -len("<|")], expected[2:] + "<|", expected + "<|"}


def config(**settings: Any) -> Any:
    compression = {"recipe": "ems", "budget": 64, "recent_window": 32, **settings}
    return SimpleNamespace(
        additional_config={"kv_compression": compression},
        model_config=SimpleNamespace(
            max_model_len=4096, get_total_num_hidden_layers=lambda: 4, served_model_name="m"
        ),
        cache_config=SimpleNamespace(block_size=16),
    )


def resolved(vllm_config: Any, messages: list[Any], xargs: Any = None) -> Any:
    """`vllm_xargs` of a chat request once it has been rendered."""
    request = ChatCompletionRequest(messages=messages, vllm_xargs=xargs, max_tokens=64)

    def rendered(messages: list[Any]) -> Any:
        return messages, [{"prompt_token_ids": ids(chatml(messages, None))}]

    async def render(*, request: Any, messages: list[Any], tool_dicts: Any) -> Any:
        assert not request.add_generation_prompt
        return rendered(messages)

    asyncio.run(protect_roles(vllm_config, request, messages, None, rendered(messages), render))
    return request.vllm_xargs


LONG = {"role": "user", "content": "x" * 600}
END = len(chatml([SYSTEM], None))


def test_roles_become_ranges():
    found = resolved(config(), [SYSTEM, LONG], {"kv_protect": "system,100-103", "seed": 1})
    assert found == {"kv_protect": [f"0-{END}", "100-103"], "seed": 1}


def test_roles_of_the_server_are_of_requests_that_say_nothing():
    server = config(protect=["system", "tools"])
    assert resolved(server, [SYSTEM, LONG]) == {"kv_protect": [f"0-{END}"]}
    # A conversation without one protects nothing.
    assert resolved(server, [LONG]) == {"kv_protect": []}
    for own in ("none", [], "100-103"):
        assert resolved(server, [SYSTEM, LONG], {"kv_protect": own}) == {"kv_protect": own}
    off = {"kv_compression": "off"}
    assert resolved(server, [SYSTEM, LONG], off) == off
    assert resolved(config(), [SYSTEM, LONG]) is None


@pytest.mark.parametrize(
    ("settings", "messages", "xargs", "parts"),
    [
        ({}, [LONG], {"kv_protect": "system"}, ["kv_protect='system'", "'system' is not in"]),
        ({}, [SYSTEM, LONG], {"kv_protect": ["tools"]}, ["'tools' is not in the conversation"]),
        (
            {},
            [SYSTEM, LONG, ANSWER, {"role": "user", "content": "y" * 200}],
            {"kv_protect": "last_user"},
            ["kv_protect=['last_user']", "and 64 entries are kept"],
        ),
        (
            {"protect": ["system"]},
            [{"role": "system", "content": "s" * 200}, LONG],
            None,
            ["kv_compression_config.protect=['system']", "64 entries are kept", "'none'"],
        ),
    ],
)
def test_a_role_that_is_missing_or_has_no_room_is_refused(settings, messages, xargs, parts):
    with pytest.raises(VLLMValidationError) as refusal:
        resolved(config(**settings), messages, xargs)
    for part in parts:
        assert part in str(refusal.value)
