# SPDX-License-Identifier: Apache-2.0
"""Clients of every kind, all at once: mixed lengths, shared prefixes, some leave early."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ems_vllm.eval.server.process import Server

MIN_LEN, MAX_LEN = 10, 6000
MAX_NEW_TOKENS = 96
_NUM_PREFIXES = 3
_LONGEST_WAIT_S = 1.0
_FIRST_TOKEN, _END_TOKEN = 300, 2048
# Sizes of their own beside the server's, and requests that are not compressed at all.
_XARGS: tuple[dict[str, Any] | None, ...] = (
    *(None, None, None, {"kv_budget": 48}),
    *(None, None, {"kv_ratio": 0.02}, {"kv_compression": "off"}),
)
_salts = itertools.count()


@dataclass(frozen=True)
class Case:
    """A request of which there is one right answer.

    Attributes:
        xargs: Its `vllm_xargs`; a server without compression ignores ours.
    """

    prompt: list[int]
    num_tokens: int
    xargs: dict[str, Any] | None


@dataclass(frozen=True)
class Job:
    """One time that a case is sent.

    Attributes:
        case_idx: Which case.
        is_streamed: Whether the answer comes token by token.
        leaves_after_s: The client leaves after so many seconds without a token; None: it stays.
        leaves_after_tokens: The client leaves after so many tokens; None: it stays.
    """

    case_idx: int
    is_streamed: bool = False
    leaves_after_s: float | None = None
    leaves_after_tokens: int | None = None


@dataclass
class Answer:
    """What a client got.

    Attributes:
        token_ids: As far as the client stayed.
        top_gaps: Per token, log-probability of the best minus the second best; if asked for.
        num_cached: Tokens of the prompt that came from the prefix cache.
        is_finished: Whether the client stayed to the end.
        error: What went wrong, or None.
    """

    token_ids: list[int] = field(default_factory=list)
    top_gaps: list[float] = field(default_factory=list)
    num_cached: int = 0
    is_finished: bool = False
    error: str | None = None


def make_cases(count: int, seed: int, max_len: int = MAX_LEN, shared_every: int = 5) -> list[Case]:
    """Requests of mixed lengths, the shortest and the longest among them.

    One in shared_every continues one of a few shared prefixes.
    """
    generator = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(_FIRST_TOKEN, _END_TOKEN) for _ in range(length)]

    prefixes = [tokens(max_len // 3) for _ in range(_NUM_PREFIXES)]
    cases = []
    for i in range(count):
        is_shared = i % shared_every == shared_every - 1
        shared = prefixes[i // shared_every % _NUM_PREFIXES] if is_shared else []
        longest = max_len - len(shared)
        # More short ones than long ones, as the longest cost most of the time.
        place = float(i) if i < 2 else generator.random() ** 2
        length = round(MIN_LEN * (longest / MIN_LEN) ** place)
        is_long_answer = generator.random() < 0.2
        num_tokens = MAX_NEW_TOKENS if is_long_answer else generator.randrange(6, 32)
        cases.append(Case([*shared, *tokens(length)], num_tokens, generator.choice(_XARGS)))
    return cases


def make_jobs(cases: Sequence[Case], count: int, seed: int) -> list[Job]:
    """Every case about equally often, in an order of its own each time; a fifth leaves early."""
    generator = random.Random(seed)
    jobs: list[Job] = []
    while len(jobs) < count:
        for case_idx in generator.sample(range(len(cases)), len(cases)):
            kind = len(jobs) % 10
            if kind == 3:
                after_s = generator.uniform(0, _LONGEST_WAIT_S)
                jobs.append(Job(case_idx, is_streamed=True, leaves_after_s=after_s))
            elif kind == 7:
                after = generator.randrange(1, cases[case_idx].num_tokens)
                jobs.append(Job(case_idx, is_streamed=True, leaves_after_tokens=after))
            else:
                jobs.append(Job(case_idx, is_streamed=kind % 2 == 0))
    return jobs[:count]


def answers_alone(server: Server, cases: Sequence[Case]) -> list[Answer]:
    """The answers of an idle server, one at a time and without a hit in the prefix cache."""
    jobs = [Job(i) for i in range(len(cases))]
    return [a for _, a in run(server, cases, jobs, num_clients=1, is_salted=True, num_logprobs=2)]


def run(
    server: Server,
    cases: Sequence[Case],
    jobs: Sequence[Job],
    num_clients: int,
    is_salted: bool,
    num_logprobs: int | None = None,
    on_end: Callable[[int], None] = lambda num_ended: None,
) -> list[tuple[Job, Answer]]:
    """Send all jobs, `num_clients` at a time; each client sends the next when it has its answer.

    Args:
        is_salted: Whether requests are kept from sharing prefixes.
        num_logprobs: Asked for of every token; needed for `Answer.top_gaps`.
        on_end: Called with the number of ended jobs whenever one has ended.
    """
    extra: dict[str, Any] = {}
    if num_logprobs is not None:
        # By id: two tokens may have the same text.
        extra = {"logprobs": num_logprobs, "return_tokens_as_token_ids": True}
    results: list[tuple[Job, Answer]] = []

    async def client(session: aiohttp.ClientSession, queue: Iterator[Job]) -> None:
        for job in queue:
            body = {**_body(server.model, cases[job.case_idx], is_salted), **extra}
            results.append((job, await _answer(session, job, body)))
            on_end(len(results))

    async def all_clients() -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        # Every request is a client of its own; a kept connection may be closed as it is used.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(
            server.url, timeout=timeout, connector=connector
        ) as session:
            queue = iter(jobs)
            await asyncio.gather(*(client(session, queue) for _ in range(num_clients)))

    asyncio.run(all_clients())
    return results


def _body(model: str, case: Case, is_salted: bool) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": case.prompt,
        "max_tokens": case.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if case.xargs is not None:
        body["vllm_xargs"] = case.xargs
    if is_salted:
        body["cache_salt"] = f"load-{next(_salts)}"
    return body


async def _answer(session: aiohttp.ClientSession, job: Job, body: dict[str, Any]) -> Answer:
    answer = Answer()
    if job.is_streamed:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with (
            asyncio.timeout(job.leaves_after_s) as until_first_token,
            session.post("/v1/completions", json=body) as response,
        ):
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {await response.text()}"
            elif job.is_streamed:
                await _read_stream(response, job, answer, until_first_token)
            else:
                _take(answer, json.loads(await response.read()))
                answer.is_finished = True
    except TimeoutError:
        pass
    except aiohttp.ClientError as error:
        answer.error = f"the connection broke: {error!r}"
    if answer.is_finished and len(answer.token_ids) != body["max_tokens"]:
        answer.error = f"{len(answer.token_ids)} tokens instead of {body['max_tokens']}"
    return answer


async def _read_stream(
    response: aiohttp.ClientResponse, job: Job, answer: Answer, until_first_token: asyncio.Timeout
) -> None:
    async for line in response.content:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            answer.is_finished = True
        elif data:
            chunk = json.loads(data)
            if "error" in chunk:
                answer.error = f"the server broke off: {chunk['error']}"
                return
            _take(answer, chunk)
        if answer.token_ids:
            until_first_token.reschedule(None)
            limit = job.leaves_after_tokens
            if limit is not None and len(answer.token_ids) >= limit:
                # What the server still sends is not read: the connection is closed, not reused.
                response.close()
                return


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    """Add what a chunk, or a whole answer, brought."""
    for choice in chunk["choices"]:
        answer.token_ids += choice["token_ids"]
        logprobs = choice.get("logprobs")
        if logprobs is not None:
            for top in logprobs["top_logprobs"]:
                best, second = sorted(top.values(), reverse=True)[:2]
                answer.top_gaps.append(best - second)
    details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
    answer.num_cached = details.get("cached_tokens") or answer.num_cached
