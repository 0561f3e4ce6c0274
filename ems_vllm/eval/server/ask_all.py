# SPDX-License-Identifier: Apache-2.0
"""Asks many samples at a time, and notes every answer as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ems_vllm.eval.questions.sample import Sample
from ems_vllm.eval.records.journal import Entry, Journal, Session
from ems_vllm.eval.server.asker import Asker
from ems_vllm.eval.server.measure import PoolWatch


async def ask_all(
    asker: Asker, journal: Journal, samples: Sequence[Sample], concurrency: int, console: Console
) -> None:
    """Ask for one method; the answers, and what they took, are in the journal afterwards.

    Args:
        asker: Of the method.
        journal: Of the method.
        samples: At least one, without answers.
        concurrency: Requests at a time that the asker's endpoint sends.
        console: For progress and remarks.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task(str(asker.method), total=len(samples))

        async def one(sample: Sample) -> Entry:
            entry = await asker.ask(sample)
            journal.add(entry)
            bar.advance(line)
            return entry

        began = time.perf_counter()
        async with PoolWatch(asker.endpoint) as watch:
            entries = await _gather(one, samples, 2 * concurrency)
    journal.add(
        Session(
            wall_s=time.perf_counter() - began,
            num_tokens=sum(entry.num_tokens for entry in entries),
            peak_blocks=watch.peak_blocks,
        )
    )
    failed = [entry for entry in entries if entry.result.error]
    if failed:
        console.print(
            f"{asker.method}: {len(failed):,} of {len(entries):,} requests failed, the first "
            f"with: {failed[0].result.error}",
            highlight=False,
            markup=False,
        )


async def _gather(
    ask: Callable[[Sample], Awaitable[Entry]], samples: Sequence[Sample], num_workers: int
) -> list[Entry]:
    """All answers, with so many under way that the endpoint's limit is always used."""
    waiting = iter(samples)
    entries: list[Entry] = []

    async def worker() -> None:
        for sample in waiting:
            entries.append(await ask(sample))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(num_workers, len(samples))):
                group.create_task(worker())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return entries
