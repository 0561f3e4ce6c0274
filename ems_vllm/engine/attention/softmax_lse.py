# SPDX-License-Identifier: Apache-2.0
"""Where an attention kernel leaves the log of its softmax denominators, when somebody wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class CapturedLse:
    """The log of the softmax denominators that a kernel left.

    Attributes:
        lse: [num_heads, num_tokens], float32, as FlashAttention lays it out; None when another
            kernel ran.
    """

    lse: torch.Tensor | None = None


# A worker runs one layer at a time.
_captures: list[CapturedLse] = []


@contextmanager
def capture_lse() -> Iterator[CapturedLse]:
    """Ask the attention calls in this block for their LSE."""
    kept = CapturedLse()
    _captures.append(kept)
    try:
        yield kept
    finally:
        _captures.pop()


def open_capture() -> CapturedLse | None:
    """Where to leave the LSE, or None when nobody asked."""
    return _captures[-1] if _captures else None
