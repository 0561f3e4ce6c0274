# SPDX-License-Identifier: Apache-2.0
"""Two API server processes in front of two engines (data parallelism): as one of each."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from e2e.clients import complete, prompt

from ems_vllm.eval.server.process import Server


@pytest.fixture(scope="module")
def two_of_each(start_server):
    """As the `server` fixture, twice."""
    settings = '{"budget": 128, "inspect_requests": 4}'
    args = ("--kv-compression", "ems", "--kv-compression-config", settings)
    parallel = ("--api-server-count", "2", "--data-parallel-size", "2")
    with start_server("random-llama", *args, *parallel) as running:
        yield running


def answer(server: Server, xargs: dict[str, object]) -> httpx.Response:
    """One request on a connection of its own, so that the kernel picks the process anew."""
    body = {"model": server.model, "prompt": "a", "max_tokens": 2, "vllm_xargs": xargs}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def test_every_frontend_refuses_a_bad_request_and_the_engines_live_on(two_of_each):
    # Eight connections all meet the same one of two processes once in 128 runs; then this test
    # proves less, but does not fail.
    for _ in range(8):
        response = answer(two_of_each, {"kv_bugdet": 64})
        assert response.status_code == 400, response.text
        assert "kv_bugdet=64" in response.text
    assert answer(two_of_each, {"kv_budget": 64}).status_code == 200
    # Whichever process refused it, the page adds them up.
    metrics = httpx.get(f"{two_of_each.url}/metrics", timeout=30).text
    refused = re.findall(
        r'^ems_vllm:requests_refused_total\{[^}]*"misspelt"\} (\S+)', metrics, re.M
    )
    assert sum(map(float, refused)) == 8


def test_two_engines_answer_as_one(two_of_each, server):
    prompts = [prompt(length, seed=length) for length in (900, 700, 60, 1200, 500, 330)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda tokens: complete(two_of_each, tokens, 32), prompts))
    assert answers == [complete(server, tokens, 32) for tokens in prompts]
    metrics = httpx.get(f"{two_of_each.url}/metrics", timeout=30).text
    served = re.findall(
        r'^vllm:prompt_tokens_total\{[^}]*engine="(\d)"[^}]*\} (\S+)', metrics, re.M
    )
    assert {engine for engine, tokens in served if float(tokens) > 0} == {"0", "1"}
    # Whichever process was told, the page adds them up.
    compressed = re.findall(
        r'^ems_vllm:requests_total\{engine="(\d)"[^}]*outcome="compressed"\} (\S+)', metrics, re.M
    )
    assert {engine for engine, _ in compressed} == {"0", "1"}
    assert sum(float(count) for _, count in compressed) >= 5


def test_the_status_page_is_of_all_engines(two_of_each):
    prompts = [prompt(900 + seed, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(lambda tokens: complete(two_of_each, tokens, 16), prompts))
    root = f"{two_of_each.url}/v1/kv_compression"
    assert httpx.get(root, timeout=60).json()["num_engines"] == 2
    found = httpx.get(f"{root}/requests", timeout=60).json()
    assert {900 + seed for seed in range(4)} <= {one["prompt_tokens"] for one in found}
    for one in found:
        detail = httpx.get(f"{root}/requests/{one['request_id']}?bins=8", timeout=60).json()
        assert len(detail["heads"]) == 4 * 4
        assert detail["text"] is None
