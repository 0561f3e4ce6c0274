# SPDX-License-Identifier: Apache-2.0
"""Budgets as the literature counts them, and as a server is told.

The literature (and kvpress) counts all entries that a kv_head holds once the prompt is processed,
sinks and recent window included: the *total*. A server is told how many entries it keeps beside
the recent window, in whole blocks (`kv_budget`). With P prompt tokens, block size bs and recent
window W, a compressed request holds

    kv_budget  +  P - (P - W) // bs * bs

entries: the window is cut at a block's edge, so it has W to W + bs - 1 of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ems_vllm.config.errors import ConfigError, shown


@dataclass(frozen=True)
class Budget:
    """How many entries per kv_head a method may hold; one of the two is given, or none (all).

    Attributes:
        count: Entries, sinks and recent window included.
        fraction: The same as a fraction of the nominal context length.
    """

    count: int | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, value: object) -> Budget:
        """A count (256), a fraction (0.03) or "full".

        Raises:
            ConfigError: it is none of them.
        """
        try:
            if value == "full":
                return cls()
            number = float(str(value))
            if 0 < number < 1:
                return cls(fraction=number)
            if number == int(number) and number >= 1:
                return cls(count=int(number))
        except (ValueError, OverflowError):
            pass
        raise ConfigError(
            f"budgets={shown(value)} is not a budget: give entries (256), a fraction of the "
            "length (0.03), or full."
        )

    def total(self, length: int) -> int | None:
        """Entries per kv_head at a nominal context length; None: all."""
        if self.fraction is not None:
            # Not int(): 0.07 * 100 is below 7.
            return math.floor(self.fraction * length + 1e-9)
        return self.count

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{self.fraction:g}"
        return "full" if self.count is None else str(self.count)


def kv_budget(total: int, prompt_len: int, recent_window: int, block_size: int) -> int | None:
    """What to ask a server for so that a request holds at most `total` entries per kv_head.

    It then holds less than a block fewer. The server must not refuse small savings
    (`min_blocks_saved=1`).

    Args:
        total: Entries, sinks and recent window included.
        prompt_len: Tokens of the prompt.
        recent_window, block_size: The server's.

    Returns:
        A whole number of blocks, in entries; None where `total` leaves no room for one.
    """
    if total >= prompt_len:
        return largest_kv_budget(total, recent_window, block_size)
    tail = prompt_len - max(prompt_len - recent_window, 0) // block_size * block_size
    num_blocks = (total - tail) // block_size
    return num_blocks * block_size if num_blocks >= 1 else None


def largest_kv_budget(total: int, recent_window: int, block_size: int) -> int:
    """The largest `kv_budget` of any prompt: the server's own setting, which is the ceiling.

    A prompt no longer than `total` is not compressed with it.
    """
    return max(1, (total - recent_window) // block_size) * block_size


def smallest_total(recent_window: int, block_size: int) -> int:
    """The smallest total for which every prompt has a `kv_budget`."""
    return recent_window + block_size - 1 + block_size
