# SPDX-License-Identifier: Apache-2.0
"""What a server did while it was watched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.config.errors import ConfigError
from ems_vllm.doctor.live.lengths import Lengths, lengths
from ems_vllm.doctor.live.page import Page
from ems_vllm.doctor.live.pool import Pool, pool_of
from ems_vllm.doctor.live.reading import Reading


@dataclass(frozen=True)
class Traffic:
    """Gauges in the mean of the readings, counters by their increase.

    Attributes:
        seconds: From the first reading to the last.
        num_readings: How often the page was read.
        num_engines: Of a data-parallel server; 1 elsewhere.
        is_asleep: Whether every engine was put to sleep.
        usage: Of the pool that was fullest in the mean, 0 to 1.
        usage_in_queue: As usage, over the readings in which requests of that engine waited; None
            where none did.
        running, waiting: Requests, all engines together.
        preemptions: Of all engines.
        prompt_rate: Prompt tokens that were computed, per second; those of hits are not.
        generation_rate: Generated tokens per second.
        hit_rate: Share of the prompts' tokens that the prefix cache had; None without prompts.
        ttft_s, queue_s: Seconds to the first token and of waiting before it, in the mean; None
            where no request came that far.
        prefill_share: Of the time that requests ran, the part before their first token; None where
            none has ended.
        lengths: Of requests that have ended; None where none has.
        pool: Of each engine; None where the server does not say.
        blocks_of_running: That a running request holds, in the mean; those in the prefix cache that
            nobody uses are not among them. None where none runs or the pool is not known.
    """

    seconds: float
    num_readings: int
    num_engines: int
    is_asleep: bool
    usage: float
    usage_in_queue: float | None
    running: float
    waiting: float
    preemptions: int
    prompt_rate: float
    generation_rate: float
    hit_rate: float | None
    ttft_s: float | None
    queue_s: float | None
    prefill_share: float | None
    lengths: Lengths | None
    pool: Pool | None
    blocks_of_running: float | None


def traffic(readings: Sequence[Reading]) -> Traffic:
    """What happened between the first reading and the last.

    Raises:
        ConfigError: the server was started again in between.
    """
    pages = [reading.page for reading in readings]
    first, last = pages[0], pages[-1]
    seconds = readings[-1].at - readings[0].at
    if _increase(pages, "vllm:generation_tokens_total") < 0:
        raise ConfigError("the server was started again while it was watched: ask once more.")
    hits = _increase(pages, "vllm:prefix_cache_hits_total")
    queries = _increase(pages, "vllm:prefix_cache_queries_total")
    prefill = _increase(pages, "vllm:request_prefill_time_seconds_sum")
    ran = prefill + _increase(pages, "vllm:request_decode_time_seconds_sum")
    usages = [page.by_engine("vllm:kv_cache_usage_perc") for page in pages]
    running = _mean([page.total("vllm:num_requests_running") or 0.0 for page in pages])
    pool = pool_of(last)
    used = None if pool is None else pool.num_blocks * _mean([sum(u.values()) for u in usages])
    return Traffic(
        seconds=seconds,
        num_readings=len(readings),
        num_engines=max(1, len(usages[-1])),
        is_asleep=last.total("vllm:engine_sleep_state", sleep_state="awake") == 0,
        usage=max(
            (_mean([usage.get(name, 0.0) for usage in usages]) for name in usages[-1]), default=0.0
        ),
        usage_in_queue=_usage_in_queue(pages),
        running=running,
        waiting=_mean([sum(_waiting(page).values()) for page in pages]),
        preemptions=round(_increase(pages, "vllm:num_preemptions_total")),
        prompt_rate=_computed(pages) / seconds,
        generation_rate=_increase(pages, "vllm:generation_tokens_total") / seconds,
        hit_rate=hits / queries if queries > 0 else None,
        ttft_s=_mean_of(pages, "vllm:time_to_first_token_seconds"),
        queue_s=_mean_of(pages, "vllm:request_queue_time_seconds"),
        prefill_share=prefill / ran if ran > 0 else None,
        lengths=lengths(first, last),
        pool=pool,
        blocks_of_running=used / running if used and running else None,
    )


def _waiting(page: Page) -> dict[str, float]:
    """Requests of each engine that wait for room, and not for something else."""
    by_reason = page.by_engine("vllm:num_requests_waiting_by_reason", reason="capacity")
    return by_reason or page.by_engine("vllm:num_requests_waiting")


def _usage_in_queue(pages: Sequence[Page]) -> float | None:
    usages: dict[str, list[float]] = defaultdict(list)
    for page in pages:
        usage = page.by_engine("vllm:kv_cache_usage_perc")
        for engine, waiting in _waiting(page).items():
            if waiting:
                usages[engine].append(usage.get(engine, 0.0))
    return max(map(_mean, usages.values()), default=None)


def _computed(pages: Sequence[Page]) -> float:
    """Prompt tokens that were computed."""
    computed = "vllm:prompt_tokens_by_source_total"
    if pages[-1].total(computed, source="local_compute") is not None:
        return _increase(pages, computed, source="local_compute")
    return _increase(pages, "vllm:prompt_tokens_total")


def _increase(pages: Sequence[Page], name: str, **labels: str) -> float:
    return (pages[-1].total(name, **labels) or 0.0) - (pages[0].total(name, **labels) or 0.0)


def _mean_of(pages: Sequence[Page], histogram: str) -> float | None:
    count = _increase(pages, f"{histogram}_count")
    return _increase(pages, f"{histogram}_sum") / count if count > 0 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
