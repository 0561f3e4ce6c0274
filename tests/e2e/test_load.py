# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, some of which leave early: every block comes back."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.clients import complete, greedy, prompt, wait_until_idle
from openai import AsyncOpenAI
from serving import pool
from serving.server import Server

NUM_CLIENTS = 32
NUM_TOKENS = 40
# 10 to 3,000 tokens, each step the same factor.
LENGTHS = [round(10 * 300 ** (i / (NUM_CLIENTS - 1))) for i in range(NUM_CLIENTS)]


def test_clients_of_every_kind(server: Server) -> None:
    tokens = prompt(150, seed=20)
    before = complete(server, tokens, 16)
    wait_until_idle(server)

    counts = asyncio.run(_all_clients(server))

    finished = [count for count in counts if count is not None]
    assert finished == [NUM_TOKENS] * len(finished)
    assert len(finished) == NUM_CLIENTS // 2
    state = wait_until_idle(server)
    assert state.num_used_blocks == 0
    assert complete(server, tokens, 16) == before


async def _all_clients(server: Server) -> list[int | None]:
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=300
    ) as client:
        # Lengths are mixed over the kinds: neighbours differ in kind.
        kinds = (_whole, _streamed, _left_while_streaming, _left_while_waiting)
        return await asyncio.gather(
            *(
                kinds[i % len(kinds)](
                    client, {"prompt": prompt(length, i), **greedy(server, NUM_TOKENS)}
                )
                for i, length in enumerate(LENGTHS)
            )
        )


async def _whole(client: AsyncOpenAI, arguments: dict[str, Any]) -> int:
    answer = await client.completions.create(**arguments)
    return answer.usage.completion_tokens


async def _streamed(client: AsyncOpenAI, arguments: dict[str, Any]) -> int:
    options = {"include_usage": True}
    stream = await client.completions.create(stream=True, stream_options=options, **arguments)
    return [chunk async for chunk in stream][-1].usage.completion_tokens


async def _left_while_streaming(client: AsyncOpenAI, arguments: dict[str, Any]) -> None:
    async with await client.completions.create(stream=True, **arguments) as stream:
        for _ in range(5):
            await anext(stream)


async def _left_while_waiting(client: AsyncOpenAI, arguments: dict[str, Any]) -> None:
    # Many times longer than the client waits, on any machine.
    long = {**arguments, "max_tokens": 4000}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.completions.create(**long), timeout=0.15)


@pytest.fixture(scope="module")
def small_server(start_server: Any) -> Iterator[Server]:
    """A server that has to preempt: eight requests do not fit, compressed or not."""
    args = (
        *("--max-model-len", "1024", "--num-gpu-blocks-override", "72"),
        *("--kv-compression", "ems", "--kv-compression-config"),
        '{"budget": 64, "recent_window": 32, "recompress_interval": 64}',
    )
    with start_server("ems-tiny-qwen3", *args) as running:
        yield running


def test_preemption_ends_clean(small_server: Server) -> None:
    prompts = [prompt(100 + 40 * i, seed=30 + i) for i in range(8)]

    async def all_clients() -> list[int]:
        async with AsyncOpenAI(
            base_url=f"{small_server.url}/v1", api_key="unused", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(
                *(_whole(client, {"prompt": p, **greedy(small_server, 150)}) for p in prompts)
            )

    assert asyncio.run(all_clients()) == [150] * len(prompts)
    assert pool.read(small_server.url).num_preemptions > 0
    assert wait_until_idle(small_server).num_used_blocks == 0
    # The pool is whole: a request that needs nearly all of it is served.
    assert complete(small_server, prompt(1000, seed=40), 16)
