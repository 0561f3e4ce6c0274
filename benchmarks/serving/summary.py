# SPDX-License-Identifier: Apache-2.0
"""From traces and samples to the figures of one run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from serving.load import Load, Sample, Trace


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile over the requests."""

    median: float
    p95: float


@dataclass(frozen=True)
class Summary:
    """The figures of one run.

    Attributes:
        num_blocks: Blocks of the pool.
        peak_blocks: Most blocks in use in any sample.
        steady_blocks_per_request: Median of blocks in use per running request over the steady
            samples, those at which every running request is decoding; None without one.
        peak_running: Most requests running at a time.
        output_tokens_per_s: Generated tokens over the wall time, prompts included.
        decode_tokens_per_s: Generated tokens between steady samples over the time between them.
        ttft_s: From sending a request to its first token, queueing included.
        tpot_ms: Time per output token after the first one.
        num_preemptions: Requests that lost their blocks and started again.
        wall_s: From the first request to the last answer.
    """

    num_blocks: int
    peak_blocks: int
    steady_blocks_per_request: float | None
    peak_running: int
    output_tokens_per_s: float
    decode_tokens_per_s: float | None
    ttft_s: Spread
    tpot_ms: Spread
    num_preemptions: int
    wall_s: float


def summarize(load: Load, preemptions_before: int) -> Summary:
    """Sum up one run.

    Args:
        load: The run.
        preemptions_before: The server's count before it.
    """
    wall = max(trace.ended for trace in load.traces)
    states = [sample.pool for sample in load.samples]
    steady = steady_intervals(load)
    duration = sum(end.time - start.time for start, end in steady)
    decoded = sum(
        _tokens_until(trace, end.time) - _tokens_until(trace, start.time)
        for start, end in steady
        for trace in load.traces
    )
    per_request = [end.pool.num_used_blocks / end.pool.num_running for _, end in steady]
    return Summary(
        num_blocks=states[0].num_blocks,
        peak_blocks=max(state.num_used_blocks for state in states),
        steady_blocks_per_request=median(per_request) if per_request else None,
        peak_running=max(state.num_running for state in states),
        output_tokens_per_s=sum(trace.tokens[-1][1] for trace in load.traces) / wall,
        decode_tokens_per_s=decoded / duration if duration else None,
        ttft_s=_spread([trace.tokens[0][0] - trace.sent for trace in load.traces]),
        tpot_ms=_spread([1000 * _time_per_token(trace) for trace in load.traces]),
        num_preemptions=max(state.num_preemptions for state in states) - preemptions_before,
        wall_s=wall,
    )


def steady_intervals(load: Load) -> list[tuple[Sample, Sample]]:
    """Pairs of successive samples between which every running request received a token.

    A request whose prompt is being processed, for the first time or after a preemption, receives
    none; so where all receive one, nothing but decoding goes on.
    """
    intervals = []
    for start, end in zip(load.samples, load.samples[1:], strict=False):
        decoding = sum(
            trace.ended > end.time
            and _tokens_until(trace, end.time) > _tokens_until(trace, start.time)
            for trace in load.traces
        )
        if decoding >= end.pool.num_running > 0:
            intervals.append((start, end))
    return intervals


def _tokens_until(trace: Trace, time: float) -> int:
    return next((count for at, count in reversed(trace.tokens) if at <= time), 0)


def _time_per_token(trace: Trace) -> float:
    (first, first_count), (last, count) = trace.tokens[0], trace.tokens[-1]
    return (last - first) / max(1, count - first_count)


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    return Spread(median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])
