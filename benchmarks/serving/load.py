# SPDX-License-Identifier: Apache-2.0
"""Concurrent streaming clients, and the samples of the pool taken meanwhile."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp

from ems_vllm.eval.server import block_pool


@dataclass
class Trace:
    """What one client saw; times in seconds since the load began.

    Attributes:
        sent: When the request was sent.
        tokens: (time, tokens so far) of every chunk that brought tokens.
        ended: When the answer was complete.
    """

    sent: float
    tokens: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0


@dataclass(frozen=True)
class Sample:
    """The pool at one moment, in seconds since the load began."""

    time: float
    pool: block_pool.PoolState


@dataclass(frozen=True)
class Load:
    """A finished run of all clients."""

    traces: list[Trace]
    samples: list[Sample]


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens: no two share a prefix, so none is answered from the cache."""
    generator = random.Random(seed)
    # The first ids of a vocabulary are special tokens.
    first = min(256, vocab_size // 2)
    return [[generator.randrange(first, vocab_size) for _ in range(length)] for _ in range(count)]


def run(
    url: str, model: str, prompts: Sequence[Sequence[int]], num_new_tokens: int, interval: float
) -> Load:
    """Send all prompts at once and stream the answers, greedy, of exactly `num_new_tokens`.

    Args:
        url: Of the server.
        model: Its name there.
        prompts: Token ids.
        num_new_tokens: Of every answer.
        interval: Seconds between two samples of the pool.
    """
    return asyncio.run(_run(url, model, prompts, num_new_tokens, interval))


async def _run(
    url: str, model: str, prompts: Sequence[Sequence[int]], num_new_tokens: int, interval: float
) -> Load:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        samples: list[Sample] = []
        began = time.perf_counter()
        sampler = asyncio.create_task(_sample(session, began, interval, samples))
        try:
            clients = (_complete(session, model, p, num_new_tokens, began) for p in prompts)
            traces = await asyncio.gather(*clients)
        finally:
            sampler.cancel()
            with suppress(asyncio.CancelledError):
                await sampler
    return Load(traces, samples)


async def _complete(
    session: aiohttp.ClientSession,
    model: str,
    prompt: Sequence[int],
    num_new_tokens: int,
    began: float,
) -> Trace:
    payload = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        # A chunk may carry several tokens, so the server's count goes with each.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    trace = Trace(sent=time.perf_counter() - began)
    count = 0
    async with session.post("/v1/completions", json=payload) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if not data or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(f"the server broke off: {chunk['error']}")
            if chunk["usage"]["completion_tokens"] > count:
                count = chunk["usage"]["completion_tokens"]
                trace.tokens.append((time.perf_counter() - began, count))
    trace.ended = time.perf_counter() - began
    if count != num_new_tokens:
        raise RuntimeError(f"an answer has {count} tokens instead of {num_new_tokens}")
    return trace


async def _sample(
    session: aiohttp.ClientSession, began: float, interval: float, samples: list[Sample]
) -> None:
    while True:
        async with session.get("/metrics") as response:
            text = await response.text()
        samples.append(Sample(time.perf_counter() - began, block_pool.parse(text)))
        await asyncio.sleep(interval)
