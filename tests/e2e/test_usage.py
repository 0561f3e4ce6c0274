# SPDX-License-Identifier: Apache-2.0
"""Answers say in their `usage` what was held in the cache, and /metrics what compactions kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e.clients import client_of, greedy, prompt, wait_until_idle
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from ems_vllm.engine.frontend import metric_catalogue
from ems_vllm.eval.server.process import Server

LONG, SHORT = 900, 60
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# The recent window, the rest of a block and the answer come on top of the budget of 128.
MOST = 128 + 64 + 16 + 8


def assert_compressed(usage: Any, num_tokens: int, num_sequences: int = 1) -> None:
    found = usage.kv_compression
    assert found["recipe"] == "ems"
    assert found["tokens"] == num_tokens
    assert 128 * num_sequences < found["entries"] <= MOST * num_sequences
    assert found["compactions"] == num_sequences


def last_usage(stream: Any) -> Any:
    """Of a stream; no other chunk has one."""
    *chunks, last = list(stream)
    assert not any(chunk.usage for chunk in chunks)
    assert last.choices == []
    return last.usage


def test_completion_whole_and_streamed(server: Server, client: OpenAI) -> None:
    arguments = {"prompt": prompt(LONG, seed=1), **greedy(server, 8)}
    assert_compressed(client.completions.create(**arguments).usage, LONG + 8)
    assert_compressed(last_usage(client.completions.create(**arguments, **WITH_USAGE)), LONG + 8)


def test_chat_whole_and_streamed(server: Server, client: OpenAI, chapter: str) -> None:
    create = client.chat.completions.create
    messages = [{"role": "user", "content": chapter[:2500]}]
    whole = create(messages=messages, **greedy(server, 8)).usage
    assert_compressed(whole, whole.total_tokens)
    streamed = last_usage(create(messages=messages, **greedy(server, 8), **WITH_USAGE))
    assert_compressed(streamed, whole.total_tokens)


def test_responses_whole_and_streamed(server: Server, client: OpenAI, chapter: str) -> None:
    arguments = {"model": server.model, "input": chapter[:2500], "max_output_tokens": 4}
    whole = client.responses.create(**arguments).usage
    assert_compressed(whole, whole.total_tokens)
    *_, last = client.responses.create(**arguments, stream=True)
    assert_compressed(last.response.usage, whole.total_tokens)


def test_a_stream_that_does_not_ask_for_usage_has_none(server: Server, client: OpenAI) -> None:
    stream = client.completions.create(
        prompt=prompt(LONG, seed=2), stream=True, **greedy(server, 4)
    )
    assert not any(chunk.usage for chunk in stream)


def test_several_prompts_and_answers_are_added_up(server: Server, client: OpenAI) -> None:
    prompts = [prompt(LONG, seed=3), prompt(700, seed=4)]
    arguments = {**greedy(server, 8), "temperature": 1.0}
    answer = client.completions.create(prompt=prompts, n=2, **arguments)
    assert_compressed(answer.usage, 2 * (LONG + 700) + 4 * 8, num_sequences=4)


@pytest.mark.parametrize(
    ("length", "xargs", "recipe"),
    [(SHORT, None, "ems"), (LONG, {"kv_compression": "off"}, "off")],
    ids=["short", "off"],
)
def test_what_is_not_compressed_holds_all(
    server: Server, client: OpenAI, length: int, xargs: Any, recipe: str
) -> None:
    tokens = prompt(length, seed=5)
    usage = client.completions.create(prompt=tokens, **greedy(server, 8, xargs)).usage
    assert usage.kv_compression == {
        "recipe": recipe,
        "tokens": length + 8,
        "entries": length + 8,
        "compactions": 0,
    }


def test_a_plain_server_says_nothing(client: OpenAI, plain_server: Server) -> None:
    arguments = greedy(plain_server, 4)
    answer = client_of(plain_server).completions.create(prompt=prompt(60, seed=6), **arguments)
    assert not hasattr(answer.usage, "kv_compression")
    assert "ems_vllm:" not in httpx.get(f"{plain_server.url}/metrics", timeout=30).text


@pytest.fixture(scope="module")
def plain_server(start_server: Any) -> Iterator[Server]:
    with start_server("random-llama") as running:
        yield running


def metrics(server: Server) -> dict[str, float]:
    """Ours, by name and outcome or reason."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(r"^ems_vllm:(\w+)\{([^}]*)\} (\S+)", page, re.M)
    values: dict[str, float] = {}
    for name, labels, value in found:
        outcome = re.search(r'(?:outcome|reason)="(\w+)"', labels)
        key = name if outcome is None else f"{name} {outcome[1]}"
        values[key] = values.get(key, 0.0) + float(value)
    return values


def increase(server: Server, before: dict[str, float]) -> dict[str, float]:
    wait_until_idle(server)
    return {name: value - before.get(name, 0.0) for name, value in metrics(server).items()}


def test_metrics_count_what_compactions_did(server: Server, client: OpenAI) -> None:
    client.completions.create(prompt=prompt(SHORT, seed=7), **greedy(server, 2))
    before = metrics(server)
    for xargs in (None, None, {"kv_compression": "off"}):
        client.completions.create(prompt=prompt(LONG, seed=8), **greedy(server, 8, xargs))
    client.completions.create(prompt=prompt(SHORT, seed=9), **greedy(server, 8))
    found = increase(server, before)
    assert found["compactions_total"] == 2
    # Whole blocks before the recent window of 64.
    assert found["entries_in_total"] == 2 * ((LONG - 64) // 16 * 16)
    assert found["entries_kept_total"] == 2 * 128
    freed = found["entries_in_total"] - found["entries_kept_total"]
    assert found["blocks_freed_total"] == freed / 16
    assert found["requests_total compressed"] == 2
    assert found["requests_total off"] == 1
    assert found["requests_total fitted"] == 1
    assert metrics(server)["blocks_saved"] == 0
    merged, evicted = found["entries_merged_total"], found["entries_evicted_total"]
    assert merged > 0
    assert merged + evicted == pytest.approx(freed)
    # The second of the two alike gives up what the first one gave up, when that has ended.
    assert found["kv_bytes_freed_total"] == found["blocks_freed_total"] * block_bytes(server)
    assert found["compaction_time_seconds_count"] == 2
    assert found["compaction_time_seconds_sum"] > 0
    assert found["preemptions_avoided_total"] == 0
    # Every compressed request is measured, and changes by more than next to nothing.
    assert found["guarded_requests_total"] == found["diverged_requests_total"] == 2
    # In the mean of the layers, and of the worst.
    assert found["attention_error_count"] == 2 * 2
    assert 0 < found["attention_error_sum"] < 2 * 2 * 10
    assert 0 < metrics(server)["diverged_lower_bound"] < 1
    assert metrics(server)["diverged_upper_bound"] == 1


def block_bytes(server: Server) -> int:
    """Keys and values of a block, in float32."""
    config = json.loads((Path(server.model) / "config.json").read_text())
    num_heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return 2 * 16 * 4 * num_heads * config["head_dim"]


def test_refused_requests_are_counted(server: Server, client: OpenAI) -> None:
    before = metrics(server)
    for xargs in ({"kv_budget": 0}, {"kv_bugdet": 64}, {"kv_budget": -1}):
        with pytest.raises(BadRequestError):
            client.completions.create(prompt="a", **greedy(server, 1, xargs))
    found = increase(server, before)
    assert found["requests_refused_total kv_budget"] == 2
    assert found["requests_refused_total misspelt"] == 1


def test_the_page_has_every_metric_of_the_catalogue(server: Server, client: OpenAI) -> None:
    with pytest.raises(BadRequestError):
        client.completions.create(prompt="a", **greedy(server, 1, {"kv_budget": 0}))
    client.completions.create(prompt=prompt(SHORT, seed=11), **greedy(server, 2))
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = {family.name for family in text_string_to_metric_families(page)}
    assert {metric.name for metric in metric_catalogue.ALL} <= found


def test_blocks_saved_follow_a_request_that_its_client_leaves(
    server: Server, client: OpenAI
) -> None:
    stream = client.completions.create(
        prompt=prompt(LONG, seed=10), stream=True, **greedy(server, 2000)
    )
    for _ in range(8):
        next(stream)
    now = metrics(server)
    stream.close()
    saved = now["blocks_saved"]
    assert saved >= (LONG - 64) // 16 - 128 // 16
    assert now["kv_bytes_saved"] == saved * block_bytes(server)
    # The budget, the recent window, and what it has written meanwhile.
    assert 128 // 16 + 64 // 16 <= now["blocks_held"] < saved
    wait_until_idle(server)
    assert metrics(server)["blocks_saved"] == 0
