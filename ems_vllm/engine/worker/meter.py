# SPDX-License-Identifier: Apache-2.0
"""Measures what compactions take and merge, without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ems_vllm.engine.report import AttentionError, Measured

if TYPE_CHECKING:
    from ems_vllm.engine.group.compressed_group import CompressedGroup


class _Mark(Protocol):
    """A point in the work of a device."""

    @property
    def is_reached(self) -> bool: ...

    def seconds_after(self, other: _Mark) -> float: ...


class _HostMark:
    """Now: what a CPU was told to do is done."""

    is_reached = True

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_after(self, other: _Mark) -> float:
        assert isinstance(other, _HostMark)
        return self._time - other._time


class _StreamMark:
    """Behind what has been launched on the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    @property
    def is_reached(self) -> bool:
        return bool(self._event.query())

    def seconds_after(self, other: _Mark) -> float:
        assert isinstance(other, _StreamMark)
        return float(other._event.elapsed_time(self._event)) / 1e3


@dataclass(frozen=True)
class _Measurement:
    """Of a step that compacted, on its way from the device.

    Attributes:
        start, end: Around its work.
        num_gone: By group, entries of a kv_head that were not kept, since the start of the server.
        req_ids: Requests that were measured.
        figures: float64, there when `end` is reached - by group, entries of all layers and kv_heads
            that were merged since the start; then by measured request the errors of attention, in
            the mean of the layers and of the worst.
    """

    start: _Mark
    end: _Mark
    num_gone: list[int]
    req_ids: list[str]
    figures: torch.Tensor


class Meter:
    """Of the compactions of one worker.

    Args:
        groups: Its compressed groups, of which there is one at least.
    """

    def __init__(self, groups: Sequence[CompressedGroup]) -> None:
        self._groups = list(groups)
        self._device = groups[0].tensors.device
        self._mark: type[_HostMark] | type[_StreamMark] = (
            _StreamMark if self._device.type == "cuda" else _HostMark
        )
        self._under_way: deque[_Measurement] = deque()
        # Pinned ones by their length, kept: to allocate one may wait for the device.
        self._buffers: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._merged_before = [0.0] * len(groups)
        self._gone_before = [0] * len(groups)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the compactions of a step."""
        start = self._mark()
        yield
        counters = [group.counters for group in self._groups]
        num_gone = [each.num_entries_in - each.num_entries_kept for each in counters]
        errors = self._attention_errors()
        figures = [group.num_merged.double() for group in self._groups]
        for of_request in errors.values():
            figures += [of_request.mean().double(), of_request.max().double()]
        on_host = torch.stack(figures)
        if self._device.type == "cuda":
            on_host = self._buffer(len(figures)).copy_(on_host, non_blocking=True)
        self._under_way.append(_Measurement(start, self._mark(), num_gone, list(errors), on_host))

    def _attention_errors(self) -> dict[str, torch.Tensor]:
        """By measured request, those of all its layers."""
        found: dict[str, list[torch.Tensor]] = {}
        for group in self._groups:
            if group.divergence is not None:
                for req_id, errors in group.divergence.take().items():
                    found.setdefault(req_id, []).append(errors)
        return {req_id: torch.cat(errors) for req_id, errors in found.items()}

    def _buffer(self, length: int) -> torch.Tensor:
        """Into what is not pinned a copy would wait for the device."""
        if self._buffers[length]:
            return self._buffers[length].pop()
        return torch.empty(length, dtype=torch.float64, pin_memory=True)

    def take(self) -> Measured | None:
        """What is known and was not taken yet; None for nothing."""
        seconds: list[float] = []
        errors: list[AttentionError] = []
        num_groups, num_merged, last = len(self._groups), self._merged_before, None
        while self._under_way and self._under_way[0].end.is_reached:
            last = self._under_way.popleft()
            seconds.append(last.end.seconds_after(last.start))
            figures = last.figures.tolist()
            num_merged, of_requests = figures[:num_groups], figures[num_groups:]
            pairs = zip(last.req_ids, of_requests[::2], of_requests[1::2], strict=True)
            errors += [AttentionError(*found) for found in pairs]
            if self._device.type == "cuda":
                self._buffers[len(figures)].append(last.figures)
        if last is None:
            return None
        merged = [
            (now - old) / group.num_heads
            for now, old, group in zip(num_merged, self._merged_before, self._groups, strict=True)
        ]
        gone = [now - old for now, old in zip(last.num_gone, self._gone_before, strict=True)]
        self._merged_before, self._gone_before = num_merged, last.num_gone
        mean_merged, mean_gone = sum(merged) / len(merged), sum(gone) / len(gone)
        return Measured(seconds, mean_merged, mean_gone - mean_merged, errors)
