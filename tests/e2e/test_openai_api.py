# SPDX-License-Identifier: Apache-2.0
"""Clients see the API they know: completions, chat, streaming, several choices, seeds."""

import pytest
from e2e.clients import greedy, prompt
from openai import OpenAI

from ems_vllm.eval.server.process import Server

# The first is never compressed, the second is.
LENGTHS = (60, 900)


@pytest.mark.parametrize("length", LENGTHS)
def test_completion(server: Server, client: OpenAI, length: int) -> None:
    answer = client.completions.create(prompt=prompt(length, seed=1), **greedy(server, 24))
    assert answer.usage.prompt_tokens == length
    assert answer.usage.completion_tokens == 24
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text


@pytest.mark.parametrize("length", LENGTHS)
def test_streamed_completion_is_the_same(server: Server, client: OpenAI, length: int) -> None:
    tokens = prompt(length, seed=2)
    whole = client.completions.create(prompt=tokens, **greedy(server, 24))
    stream = client.completions.create(prompt=tokens, stream=True, **greedy(server, 24))
    chunks = [chunk.choices[0].text for chunk in stream]
    assert len(chunks) > 12
    assert "".join(chunks) == whole.choices[0].text


def test_chat_whole_and_streamed(server: Server, client: OpenAI, chapter: str) -> None:
    messages = [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": chapter[:2500]},
    ]
    create = client.chat.completions.create
    whole = create(messages=messages, **greedy(server, 24))
    stream = create(messages=messages, stream=True, **greedy(server, 24))
    assert whole.usage.prompt_tokens > 400
    assert whole.choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole.choices[0].message.content


def test_choices_differ_and_seeds_repeat(server: Server, client: OpenAI) -> None:
    tokens = prompt(500, seed=3)

    def sample(seed: int) -> list[str]:
        arguments = {**greedy(server, 16), "temperature": 1.0}
        answer = client.completions.create(prompt=tokens, n=3, seed=seed, **arguments)
        return [choice.text for choice in answer.choices]

    first = sample(seed=7)
    assert len(set(first)) == 3
    assert sample(seed=7) == first
    assert sample(seed=8) != first


def test_real_text(server: Server, client: OpenAI, chapter: str) -> None:
    answer = client.completions.create(prompt=chapter[:10000], **greedy(server, 32))
    assert answer.usage.prompt_tokens > 2000
    assert answer.usage.completion_tokens == 32
    assert answer.choices[0].text
