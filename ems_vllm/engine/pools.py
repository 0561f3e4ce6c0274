# SPDX-License-Identifier: Apache-2.0
"""What the scheduler deals out to the requests that are about to be compressed, and takes back."""

from __future__ import annotations

from collections.abc import Sequence


class Pool:
    """Free list of numbered things that workers hold: rows of the query ring, score pages.

    Args:
        first: The lowest number.
        size: How many there are.
    """

    def __init__(self, first: int, size: int) -> None:
        self.size = size
        self._free = list(range(first + size - 1, first - 1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` of them, or None when there are not so many; never some of them."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, items: Sequence[int]) -> None:
        self._free.extend(reversed(items))
