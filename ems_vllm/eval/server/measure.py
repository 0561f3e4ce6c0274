# SPDX-License-Identifier: Apache-2.0
"""Memory and speed of a method: sampled while it runs, and summed up from its journal."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from contextlib import suppress
from statistics import mean, median
from typing import Any

from ems_vllm.config import KVCompressionConfig, RequestOptions
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.eval.questions.sample import Key
from ems_vllm.eval.records.journal import Journal
from ems_vllm.eval.records.results import Serving
from ems_vllm.eval.server import block_pool
from ems_vllm.eval.server.endpoint import Endpoint

_INTERVAL_S = 0.5


class PoolWatch:
    """The most blocks in use while its context is open; None where the server does not tell."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.peak_blocks: int | None = None
        self._endpoint = endpoint
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> PoolWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        while True:
            text = await self._endpoint.metrics()
            try:
                used = block_pool.parse(text or "").num_used_blocks
            except KeyError:
                # Not vLLM's metrics.
                return
            self.peak_blocks = max(self.peak_blocks or 0, used)
            await asyncio.sleep(_INTERVAL_S)


def serving(
    journal: Journal,
    in_prompt: Collection[Key],
    config: KVCompressionConfig | None,
    shape: CacheShape | None,
    block_size: int,
) -> Serving:
    """What the answers of a method took.

    Args:
        journal: Of the method.
        in_prompt: Samples whose context is their prompt; only of these the plan says what they
            hold from the first answered token on.
        config: Its server's settings; None for the full cache.
        shape: Of the model's cache; None where it is not known.
        block_size: The server's.
    """
    entries = [entry for entry in journal.entries.values() if entry.result.error is None]
    blocks = [
        blocks_held(config, entry.result.prompt_tokens, entry.kv_budget, block_size)
        for entry in entries
        if entry.result.prompt_tokens and entry.key in in_prompt
    ]
    held = mean(blocks) if blocks else None
    wall_s = sum(session.wall_s for session in journal.sessions)
    num_tokens = sum(session.num_tokens for session in journal.sessions)
    peaks = [s.peak_blocks for s in journal.sessions if s.peak_blocks is not None]
    return Serving(
        kv_bytes_per_request=held * shape.column_bytes(block_size) if held and shape else None,
        blocks_per_request=held,
        peak_blocks=max(peaks, default=None),
        ttft_s=_median(entry.ttft_s for entry in entries),
        tpot_s=_median(entry.tpot_s for entry in entries),
        output_tokens_per_s=num_tokens / wall_s if wall_s > 0 else None,
    )


def blocks_held(
    config: KVCompressionConfig | None, prompt_len: int, budget: int | None, block_size: int
) -> int:
    """Blocks of a request once its prompt is processed, by the plan; see `ems-vllm plan`.

    A mean over the layers: where they share a budget unequally, it is what each would hold of equal
    shares, up to what is rounded down to whole blocks.
    """
    dense = -(-(prompt_len + 1) // block_size)
    if config is None or budget is None:
        return dense
    plan: Any = config.plan_settings.plan(prompt_len, block_size, RequestOptions(budget=budget))
    return dense - int(plan.columns(prompt_len)[0])


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
