# SPDX-License-Identifier: Apache-2.0
"""Times calls: on a GPU between events and with a cold second-level cache, else by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Timing stops after so long, once there are enough repeats.
SECONDS = 0.4
MIN_REPEATS, MAX_REPEATS = 5, 50


@dataclass(frozen=True)
class Times:
    """Percentiles over the repeats, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int


class Timer:
    """Times calls on one device."""

    def __init__(self, device: torch.device, seconds: float = SECONDS) -> None:
        self._device = device
        self._seconds = seconds
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            # Written before every call, so that nothing of its arguments is left in the cache.
            self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> Times:
        """Time a call, once warm."""
        once = self._on_gpu if self._device.type == "cuda" else self._on_cpu
        once(run)
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < MAX_REPEATS:
            times.append(once(run))
            if len(times) >= MIN_REPEATS and time.perf_counter() - start > self._seconds:
                break
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        return Times(deciles[1], statistics.median(times), deciles[7], len(times))

    def _on_gpu(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        # The launch must not be what is timed: the GPU is busy until everything is submitted.
        torch.cuda._sleep(100_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _on_cpu(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
