# SPDX-License-Identifier: Apache-2.0
"""Says in the `usage` of an answer of the OpenAI API what was held in the cache.

There is no place in vLLM through which both the outputs of the engine and the answer pass. So a
handler opens a Usage, the calls of AsyncLLM.generate that it makes find it in their context, and
the answer gets what they have noted.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ems_vllm.engine.frontend.holdings import ATTRIBUTE

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from ems_vllm.engine.frontend.holdings import SequenceHolding

_EVENT = "data: "
# The last chunk of a stream, with the usage of all of it, has no choices. Within a text the
# quotation marks would have backslashes.
_LAST = '"choices":[],'


class Usage:
    """Of one request of the API, which may be several of the engine.

    Args:
        recipe: How it is compressed; "off" where it is not.
    """

    def __init__(self, recipe: str) -> None:
        self._recipe = recipe
        self._holdings: dict[tuple[str, int], SequenceHolding] = {}

    def note(self, output: RequestOutput) -> None:
        """An output of the engine."""
        for completion in output.outputs:
            if (holding := getattr(completion, ATTRIBUTE, None)) is not None:
                self._holdings[output.request_id, completion.index] = holding

    def as_dict(self) -> dict[str, Any]:
        """For the API: sums over its sequences."""
        holdings = self._holdings.values()
        return {
            "recipe": self._recipe,
            "tokens": sum(holding.num_tokens for holding in holdings),
            "entries": round(sum(holding.num_entries for holding in holdings)),
            "compactions": sum(holding.num_compactions for holding in holdings),
        }


_current: ContextVar[Usage | None] = ContextVar("kv_compression_usage", default=None)


@contextmanager
def noting(usage: Usage) -> Iterator[None]:
    """Calls of the engine in here belong to a request of the API."""
    token = _current.set(usage)
    try:
        yield
    finally:
        _current.reset(token)


def noted(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Outputs of the engine, with note taken of them for the request of the API, if it is one's."""
    usage = _current.get()
    return outputs if usage is None else _noted(outputs, usage)


async def _noted(outputs: AsyncGenerator[Any, None], usage: Usage) -> AsyncGenerator[Any, None]:
    # Closed with this one: that is how vLLM learns that a client has gone.
    async with aclosing(outputs):
        async for output in outputs:
            usage.note(output)
            yield output


def with_usage(answer: Any, usage: Usage) -> Any:
    """An answer of the API that says what was held.

    Args:
        answer: A response; or the events of a stream: of completions and chats as text, of the
            Responses API as objects.
        usage: Of its request.
    """
    if isinstance(answer, AsyncGenerator):
        return _events_with_usage(answer, usage)
    return _extended(answer, usage)


def _extended(response: Any, usage: Usage) -> Any:
    # Models of the API take fields that they do not know; an error has no usage.
    if (of_response := getattr(response, "usage", None)) is not None:
        setattr(of_response, ATTRIBUTE, usage.as_dict())
    return response


async def _events_with_usage(
    events: AsyncGenerator[Any, None], usage: Usage
) -> AsyncGenerator[Any, None]:
    async with aclosing(events):
        while True:
            # The engine may be called now, or later. As `noting`, which costs more than the rest.
            token = _current.set(usage)
            try:
                event = await anext(events)
            except StopAsyncIteration:
                return
            finally:
                _current.reset(token)
            if isinstance(event, str):
                yield _chunk_with_usage(event, usage) if _LAST in event else event
            else:
                _extended(getattr(event, "response", None), usage)
                yield event


def _chunk_with_usage(event: str, usage: Usage) -> str:
    chunk = json.loads(event.removeprefix(_EVENT))
    if chunk.get("usage") is None:
        return event
    chunk["usage"][ATTRIBUTE] = usage.as_dict()
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    return f"{_EVENT}{text}\n\n"
