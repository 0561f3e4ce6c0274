# SPDX-License-Identifier: Apache-2.0
"""Asks an OpenAI endpoint, and measures how long it takes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai

from ems_vllm.config.errors import ConfigError, shown

_RETRIES = 5
_FIRST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: Generated.
        prompt_tokens, num_tokens: Of the prompt and the answer, as the server counted them.
        ttft_s: From sending to the first token.
        tpot_s: Per token after the first; None where there is only one.
        logprobs: Of prescribed tokens, natural logarithms.
        free_token_ids: What the model generated after prescribed tokens.
        tops: The most likely tokens at each generated one, where they were asked for.
    """

    text: str
    prompt_tokens: int
    num_tokens: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    logprobs: tuple[float, ...] = ()
    free_token_ids: tuple[int, ...] = ()
    tops: tuple[dict[int, float], ...] = ()

    def with_text(self, text: str) -> Answer:
        return replace(self, text=text)


class NoAnswer(Exception):
    """A request was refused, or failed in every attempt; the message says why."""


class Endpoint:
    """A server with the OpenAI API. Answers are greedy.

    Args:
        url: Without "/v1".
        model: Its name there.
        concurrency: Requests at a time.
        api_key: Where one is needed.
        is_alive: Whether there is any use in trying again; a server of our own may have died.
    """

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int,
        api_key: str = "unused",
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.is_vllm = False
        self._is_alive = is_alive
        self._limit = asyncio.Semaphore(concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=None
        )

    async def __aenter__(self) -> Endpoint:
        await self._recognise()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def complete(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        *,
        stop: Sequence[str] = (),
        xargs: dict[str, Any] | None = None,
    ) -> Answer:
        """The continuation of a prompt."""
        arguments = {"prompt": list(prompt_token_ids), **self._common(max_tokens, xargs)}
        if stop:
            arguments["stop"] = list(stop)
        return await self._try(lambda: self._stream(self._client.completions, arguments))

    async def chat(
        self,
        messages: Sequence[dict[str, str]],
        max_tokens: int,
        *,
        stop: Sequence[str] = (),
        xargs: dict[str, Any] | None = None,
    ) -> Answer:
        """The next message of a conversation."""
        arguments = {"messages": list(messages), **self._common(max_tokens, xargs)}
        if stop:
            arguments["stop"] = list(stop)
        return await self._try(lambda: self._stream(self._client.chat.completions, arguments))

    async def prescribe(
        self,
        prompt_token_ids: Sequence[int],
        answer_token_ids: Sequence[int],
        *,
        num_free_tokens: int = 0,
        num_top: int = 0,
        end_token_ids: Collection[int] = (),
        xargs: dict[str, Any] | None = None,
    ) -> Answer:
        """Make the server generate given tokens, then go on freely.

        The server runs with our logits processor (engine/measuring/forced_tokens.py) unless there
        is nothing to prescribe.

        Args:
            num_top: Most likely tokens to report at each place.
            end_token_ids: What ends the free part. Prescribed tokens may be among them: in many
                chat templates the user's turn ends as an answer does.

        Returns:
            The log probabilities of the prescribed tokens, and the tokens after them, up to the
            first that ends them.

        Raises:
            NoAnswer: also where the server generated other tokens.
        """
        forced = list(answer_token_ids)
        prescribed = {"forced_token_ids": forced} if forced else {}
        arguments = self._common(len(forced) + num_free_tokens, {**(xargs or {}), **prescribed})
        arguments["logprobs"] = num_top
        arguments["extra_body"] |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if forced:
            # vLLM would end the request at a prescribed one.
            arguments["extra_body"]["ignore_eos"] = True

        async def ask() -> Answer:
            async with self._limit:
                answer = await self._client.completions.create(
                    prompt=list(prompt_token_ids), **arguments
                )
            choice = answer.choices[0]
            token_ids = list(getattr(choice, "token_ids", None) or ())
            logprobs = choice.logprobs
            if token_ids[: len(forced)] != forced or logprobs is None:
                raise NoAnswer("the server did not generate the prescribed tokens")
            ends = (i for i in range(len(forced), len(token_ids)) if token_ids[i] in end_token_ids)
            del token_ids[next(ends, len(token_ids)) + 1 :]
            values = (logprobs.token_logprobs or [])[: len(forced)]
            return Answer(
                text="",
                prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0,
                num_tokens=len(token_ids),
                logprobs=tuple(float(value or 0.0) for value in values),
                free_token_ids=tuple(token_ids[len(forced) :]),
                tops=tuple(map(_by_token_id, (logprobs.top_logprobs or ())[: len(token_ids)])),
            )

        return await self._try(ask)

    async def predict(
        self, prompt_token_ids: Sequence[int], answer_token_ids: Sequence[int]
    ) -> Answer:
        """Log probabilities of an answer as part of the prompt: nothing is compressed.

        Raises:
            NoAnswer: also where the server is not vLLM.
        """
        if not self.is_vllm:
            raise NoAnswer("only vLLM reports the log probabilities of a prompt")
        whole = [*prompt_token_ids, *answer_token_ids]
        arguments = self._common(1, None)
        arguments["extra_body"] |= {"prompt_logprobs": 0}

        async def ask() -> Answer:
            async with self._limit:
                answer = await self._client.completions.create(prompt=whole, **arguments)
            found = getattr(answer.choices[0], "prompt_logprobs", None) or []
            pairs = list(zip(found, whole, strict=True))[len(prompt_token_ids) :]
            return Answer(
                text="",
                prompt_tokens=len(prompt_token_ids),
                num_tokens=0,
                logprobs=tuple(float(at[str(token)]["logprob"]) for at, token in pairs),
            )

        return await self._try(ask)

    async def can_prescribe(self) -> bool:
        """Whether the server runs with our logits processor."""
        try:
            await self.prescribe([3, 4, 5], [5, 4, 5, 3])
        except NoAnswer:
            return False
        return True

    async def compresses(self) -> bool:
        """Whether the server knows our arguments: it then refuses a budget of nothing."""
        try:
            await self.complete([3, 4, 5], 1, xargs={"kv_budget": 0})
        except NoAnswer as refusal:
            return "kv_budget" in str(refusal)
        return False

    async def metrics(self) -> str | None:
        """The text of `/metrics`; None where there is none."""
        try:
            async with httpx.AsyncClient(timeout=30) as client:
                response = await client.get(f"{self.url}/metrics")
        except httpx.HTTPError:
            return None
        return response.text if response.status_code == 200 else None

    async def _recognise(self) -> None:
        """Find out whether this is vLLM, which takes arguments that others refuse."""
        try:
            async with httpx.AsyncClient(timeout=30) as client:
                await client.get(f"{self.url}/v1/models")
                response = await client.get(f"{self.url}/version")
        except httpx.HTTPError as error:
            raise ConfigError(
                f"base_url={shown(self.url)} does not answer ({type(error).__name__}): start the "
                "server, or leave --base-url out to have one started."
            ) from None
        self.is_vllm = response.status_code == 200 and "version" in response.text

    def _common(self, max_tokens: int, xargs: dict[str, Any] | None) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.is_vllm:
            # The queries that a hit in the prefix cache spares do not score: an answer would
            # depend on what was asked before.
            extra["cache_salt"] = uuid.uuid4().hex
            if xargs:
                extra["vllm_xargs"] = xargs
        return {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "extra_body": extra,
        }

    async def _stream(self, resource: Any, arguments: dict[str, Any]) -> Answer:
        async with self._limit:
            began = time.perf_counter()
            first = last = None
            text, usage = [], None
            stream = await resource.create(
                stream=True, stream_options={"include_usage": True}, **arguments
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                if not chunk.choices:
                    continue
                choice = chunk.choices[0]
                piece = choice.text if hasattr(choice, "text") else choice.delta.content
                # Some chunks bring a token without text: half a character.
                last = time.perf_counter()
                first = first or last
                text.append(piece or "")
        num_tokens = usage.completion_tokens if usage else 0
        tpot = None
        if first is not None and last is not None and num_tokens > 1:
            tpot = (last - first) / (num_tokens - 1)
        return Answer(
            text="".join(text),
            prompt_tokens=usage.prompt_tokens if usage else 0,
            num_tokens=num_tokens,
            ttft_s=None if first is None else first - began,
            tpot_s=tpot,
        )

    async def _try(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Repeat what may work the next time, with growing pauses."""
        for attempt in range(_RETRIES + 1):
            try:
                return await ask()
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    raise NoAnswer(_message(error)) from None
                reason = _message(error)
            except (openai.APIError, httpx.HTTPError) as error:
                reason = f"{type(error).__name__}: {error}"
            if not self._is_alive():
                raise ConfigError(
                    f"the server of model={shown(self.model)} ended while it was asked: see the "
                    "end of its log in the output folder."
                )
            if attempt < _RETRIES:
                await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise NoAnswer(f"no answer in {_RETRIES + 1} attempts, the last time: {reason}")


def _by_token_id(top: dict[str, float] | None) -> dict[int, float]:
    """vLLM writes "token_id:17" where it is asked to."""
    return {int(name.removeprefix("token_id:")): value for name, value in (top or {}).items()}


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return f"HTTP {error.status_code}: {message or error}"
