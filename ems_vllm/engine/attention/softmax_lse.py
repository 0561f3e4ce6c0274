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
class KeptLse:
    """What the kernel left.

    Attributes:
        lse: [num_heads, num_tokens], float32, as FlashAttention lays it out; None when another
            kernel ran.
    """

    lse: torch.Tensor | None = None


# A worker runs one layer at a time.
_wanted: list[KeptLse] = []


@contextmanager
def keeping() -> Iterator[KeptLse]:
    """Ask the attention calls in this block for their LSE."""
    kept = KeptLse()
    _wanted.append(kept)
    try:
        yield kept
    finally:
        _wanted.pop()


def wanted() -> KeptLse | None:
    """Where to leave the LSE, or None when nobody asked."""
    return _wanted[-1] if _wanted else None
