# SPDX-License-Identifier: Apache-2.0
"""Asks the workers of all engines, and puts their answers together."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

import ems_vllm
from ems_vllm.config import settings_of
from ems_vllm.engine.status.answers import (
    Capacity,
    HeadStrip,
    Memory,
    Positions,
    RequestDetail,
    RequestSummary,
    Status,
)
from ems_vllm.engine.status.numbers import numbers_now

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

# Engines answer between two steps; a long prompt's may take this long.
_TIMEOUT_S = 30.0
# A question keeps an engine for up to tens of milliseconds; so long it has then for its requests.
_PAUSE_S = 0.1
# Different questions that wait.
MOST_WAITING = 64
_LENGTHS = (2048, 8192, 32768, 131072)


class Source:
    """What the routes answer from.

    Engines are asked one question at a time, with a pause, and those who wait with the same one
    share an answer, so that no number of readers keeps them busy.

    Args:
        engine_client: vLLM's, of one engine or several.
    """

    def __init__(self, engine_client: EngineClient) -> None:
        self._client: Any = engine_client
        self._config = settings_of(engine_client.vllm_config)
        self._lock = asyncio.Lock()
        self._free_at = 0.0
        # By method and arguments: what was not put to the engines yet.
        self._waiting: dict[tuple[Any, ...], asyncio.Task[list[list[Any]]]] = {}

    async def status(self) -> Status:
        """Of the server."""
        from vllm.version import __version__ as vllm_version

        vllm_config = self._client.vllm_config
        status = Status(
            model=str(vllm_config.model_config.served_model_name),
            recipe="off",
            version=ems_vllm.__version__,
            vllm_version=vllm_version,
        )
        if self._config is None:
            return status
        longest = vllm_config.model_config.max_model_len
        lengths = (*(length for length in _LENGTHS if length < longest), longest)
        engines = await self._ask("kv_compression_server", lengths)
        # Ranks of tensor parallelism are alike; stages of a pipeline have layers of their own.
        of_workers = engines[0]
        stages = of_workers[:: vllm_config.parallel_config.tensor_parallel_size]
        num_blocks = sum(workers[0]["num_blocks"] for workers in engines)
        return status.model_copy(
            update={
                "recipe": self._config.recipe,
                "num_engines": len(engines),
                "num_layers": sum(one["num_layers"] for one in stages),
                "num_layers_compressed": sum(one["num_layers_compressed"] for one in stages),
                "inspects_requests": self._config.inspect_requests > 0,
                "shows_text": self.shows_text,
                "settings": self._config.to_dict(),
                "now": numbers_now(num_blocks),
                "memory": Memory.model_validate(of_workers[0]),
                "capacity": [Capacity(**one) for one in of_workers[0]["capacity"]],
            }
        )

    async def requests(self) -> list[RequestSummary]:
        """Those that are remembered, by engine the last compressed first."""
        if not self._inspects:
            return []
        engines = await self._ask("kv_compression_requests")
        return [RequestSummary(**one) for workers in engines for one in workers[0] or ()]

    async def request(self, request_id: str, num_bins: int) -> RequestDetail | None:
        """One of them; None where it is not."""
        if not self._inspects:
            return None
        for workers in await self._ask("kv_compression_request", request_id, num_bins):
            found = [one for one in workers if one is not None]
            if found:
                # kv_heads may be on several ranks, where there are more ranks than heads.
                heads = {tuple(head[:2]): head[2] for one in found for head in one["heads"]}
                return RequestDetail(
                    **{**found[0], "heads": _strips(heads)},
                    text=await self._text(found[0]["token_ids"], found[0]["bins"]),
                )
        return None

    async def positions(self, request_id: str, layer: int, kv_head: int) -> Positions | None:
        """Of one kv_head; None where there is no such, or no such request."""
        if not self._inspects:
            return None
        for workers in await self._ask("kv_compression_positions", request_id, layer, kv_head):
            for found in workers:
                if found is not None:
                    return Positions(
                        request_id=request_id, layer=layer, kv_head=kv_head, positions=found
                    )
        return None

    @property
    def shows_text(self) -> bool:
        """Whether prompts are among the answers."""
        return self._config is not None and self._config.inspect_text

    @property
    def _inspects(self) -> bool:
        return self._config is not None and self._config.inspect_requests > 0

    async def _text(self, token_ids: list[int] | None, bins: list[int]) -> list[str] | None:
        if token_ids is None:
            return None
        tokenizer, texts = self._client.get_tokenizer(), []
        for start, stop in pairwise(bins):
            texts.append(tokenizer.decode(token_ids[start:stop]))
            # All of a long prompt would keep answers that are being streamed for too long.
            await asyncio.sleep(0)
        return texts

    async def _ask(self, *question: Any) -> list[list[Any]]:
        """By engine, what its workers answer.

        Args:
            question: Method of the workers, and its arguments.

        Raises:
            HTTPException: Too many questions wait, or no answer came in time.
        """
        asking = self._waiting.get(question)
        if asking is None:
            if len(self._waiting) >= MOST_WAITING:
                raise HTTPException(503, "Too many questions wait for the engine: ask later.")
            asking = self._waiting[question] = asyncio.create_task(self._put(question))
        # It goes on without this reader, who may have gone: others wait for it, too.
        await asyncio.wait((asking,), timeout=_TIMEOUT_S)
        if not asking.done():
            raise HTTPException(503, f"The engine did not answer in {_TIMEOUT_S:.0f} s: ask later.")
        return asking.result()

    async def _put(self, question: tuple[Any, ...]) -> list[list[Any]]:
        async with self._lock:
            await asyncio.sleep(self._free_at - time.monotonic())
            del self._waiting[question]
            try:
                return await self._ask_engines(*question)
            finally:
                self._free_at = time.monotonic() + _PAUSE_S

    async def _ask_engines(self, method: str, *args: Any) -> list[list[Any]]:
        # Without a timeout of the engine's: where workers are processes, it would take an answer
        # that comes too late for that to its next call, which may be a step.
        # With data parallelism vLLM's collective_rpc asks one engine.
        ask_all = getattr(self._client.engine_core, "call_utility_all_async", None)
        if ask_all is None:
            return [await self._client.collective_rpc(method, None, args)]
        answers: list[list[Any]] = await ask_all("collective_rpc", method, None, args, {})
        return answers


def _strips(heads: dict[tuple[int, ...], list[int]]) -> list[HeadStrip]:
    return [
        HeadStrip(layer=layer, kv_head=kv_head, counts=counts)
        for (layer, kv_head), counts in sorted(heads.items())
    ]
