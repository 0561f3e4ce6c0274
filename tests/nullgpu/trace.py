# SPDX-License-Identifier: Apache-2.0
"""What the null GPU was asked to do."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One call.

    Attributes:
        kind: launch, graph, copy, set, host, allocate, free, synchronize, capture or error.
        how: eager; captured into a graph; replayed from one; beside - done at once on another
            stream while the same thread captured; refused, with CUDA's error number in the name.
        device, stream: -1 where there is none; a device's default stream has the device's number.
        name: Of the kernel (without template arguments), the route of a copy, the call.
    """

    kind: str
    how: str
    device: int
    stream: int
    name: str

    @property
    def is_ours(self) -> bool:
        """Whether it is a kernel of this package."""
        return self.kind == "launch" and self.name.startswith("ems::")

    @property
    def runs(self) -> bool:
        """Whether the GPU had to do it, now."""
        return self.kind in ("launch", "copy", "set") and self.how in ("eager", "replayed")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnullgpu.so")
    library.nullgpu_take.restype = ctypes.c_void_p
    library.nullgpu_free.argtypes = [ctypes.c_void_p]
    return library


def take() -> list[Event]:
    """The events since the last call, in order."""
    pointer = _library().nullgpu_take()
    text = ctypes.string_at(pointer).decode()
    _library().nullgpu_free(pointer)
    return [_event(line) for line in text.splitlines()]


@contextmanager
def listening() -> Iterator[list[Event]]:
    """A list that holds, once the block has ended, what happened in it."""
    events: list[Event] = []
    take()
    _library().nullgpu_listen(1)
    try:
        yield events
    finally:
        _library().nullgpu_listen(0)
        events += take()


def _event(line: str) -> Event:
    kind, how, device, stream, name = line.split("\t", 4)
    return Event(kind, how, int(device), int(stream), short_name(name))


@functools.cache
def short_name(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters.

    >>> short_name("void ems::copy_kernel<float>(ems::Params)")
    'ems::copy_kernel'
    """
    found = re.match(r"(?:void )?((?:\w|::|\(anonymous namespace\))+)[<(]", name)
    return found[1] if found else name
