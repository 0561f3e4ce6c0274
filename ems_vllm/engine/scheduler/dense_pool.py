# SPDX-License-Identifier: Apache-2.0
"""What running requests would hold besides, were none of them compressed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence


class DensePool:
    """A pool without compression, as far as it differs from the one that there is.

    A column that several requests have in common would be one block there, so it counts once.
    Where a request was compressed while another one still holds such a block, that block counts
    until the other is compressed too.

    Attributes:
        num_blocks: What it holds besides.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        # By group and content, the requests that have lost such a column.
        self._sharers: defaultdict[int, Counter[Hashable]] = defaultdict(Counter)
        # By request, what it has lost, and how many columns that nobody shares.
        self._lost: defaultdict[str, list[tuple[int, Sequence[Hashable]]]] = defaultdict(list)
        self._alone: Counter[str] = Counter()
        self._beyond: set[str] = set()

    def lost(
        self, req_id: str, group_id: int, contents: Sequence[Hashable], num_columns: int
    ) -> int:
        """A request gives columns back that it would have kept here.

        Args:
            contents: What tells the leading ones from columns of other content; others are taken
                for unlike any.
            num_columns: How many they are.

        Returns:
            How many blocks more this pool holds.
        """
        sharers, num_alone = self._sharers[group_id], num_columns - len(contents)
        num_before = len(sharers)
        sharers.update(contents)
        self._lost[req_id].append((group_id, contents))
        self._alone[req_id] += num_alone
        num_more = len(sharers) - num_before + num_alone
        self.num_blocks += num_more
        return num_more

    def released(self, req_id: str) -> None:
        """A request has ended, or was preempted."""
        self._beyond.discard(req_id)
        self.num_blocks -= self._alone.pop(req_id, 0)
        for group_id, contents in self._lost.pop(req_id, ()):
            sharers = self._sharers[group_id]
            for content in contents:
                sharers[content] -= 1
                if not sharers[content]:
                    del sharers[content]
                    self.num_blocks -= 1

    def crowded_out(self, num_free: int, last_admitted_first: Iterable[tuple[str, int]]) -> int:
        """Count requests that run although this pool could not hold all that runs.

        vLLM preempts whoever was admitted last. A request is counted when it would first have had
        to go, and no more until it is admitted again: by then it would have been preempted here,
        or never let in.

        Args:
            num_free: Blocks that are free in the pool that there is.
            last_admitted_first: Requests that run, and how many blocks each would hold; read only
                where some do not fit.

        Returns:
            How many there are that were not counted before.
        """
        num_missing = self.num_blocks - num_free
        num_counted = len(self._beyond)
        if num_missing > 0:
            for req_id, num_blocks in last_admitted_first:
                self._beyond.add(req_id)
                num_missing -= num_blocks
                if num_missing <= 0:
                    break
        return len(self._beyond) - num_counted
