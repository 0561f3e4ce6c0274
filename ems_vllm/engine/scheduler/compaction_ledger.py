# SPDX-License-Identifier: Apache-2.0
"""Which compactions of a request have been ordered, and which have surely happened."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan


@dataclass
class OrderedCompaction:
    """A compaction on its way.

    Attributes:
        ledger: Whose.
        start: Tokens processed before its step.
        tail: Column behind the kept entries.
        first: Their first column: as planned, or as the worker reports it.
    """

    ledger: CompactionLedger
    start: int
    tail: int
    first: int

    def kept_from(self, first: int) -> None:
        """A worker reports that less was kept than planned: from column `first` on."""
        self.first = first
        self.ledger.num_kept[self.tail] = self.tail - first


@dataclass
class CompactionLedger:
    """Follows the steps of one request in one group, from "scheduled" to "output processed".

    A worker compacts at the start of a step, from the number of tokens processed before it. The
    columns that this makes free may be handed out only when that step's output has been processed.
    "More than P tokens processed" does not say so: a step may start before P and end beyond it (a
    resumed prefill), and then nothing has been compacted yet. So the starts are recorded.

    Attributes:
        plan: Of the request in this group.
        first, tail: Columns [first, tail) hold the kept entries in the latest step that was
            scheduled, as planned; 0, 0 before the first compaction.
        num_kept: Columns that a worker reported to have kept, by `tail`. They outlive a preemption:
            what was decided once is ordered when it comes again.
        accumulated_until: Tokens whose queries need no representation at the next compaction:
            those before the last one, or of the prompt where its queries score.
    """

    plan: CompressionPlan
    first: int = 0
    tail: int = 0
    accumulated_until: int = field(init=False)
    num_kept: dict[int, int] = field(default_factory=dict)
    _in_flight: deque[OrderedCompaction] = field(default_factory=deque)
    _first_processed: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The request gave its blocks back; whatever comes begins anew."""
        self.first = self.tail = self._first_processed = 0
        self.accumulated_until = self.plan.prompt_len if self.plan.compresses_prompt else 0
        self._in_flight.clear()

    def step_scheduled(self, start: int) -> OrderedCompaction | None:
        """A step that begins with `start` processed tokens goes to the workers.

        Returns:
            The compaction that falls due in it, if one does; `first` and `tail` are those after it.
        """
        if not self.falls_due(start):
            return None
        self.first, self.tail = self.plan.columns(start)
        ordered = OrderedCompaction(self, start, self.tail, self.first)
        self._in_flight.append(ordered)
        return ordered

    def falls_due(self, start: int) -> bool:
        """Whether a step that begins with `start` processed tokens compacts."""
        return self.plan.columns(start)[0] > self.first

    def is_settled(self, num_processed_tokens: int) -> bool:
        """Whether the output of every step that compacts has been processed."""
        self.columns_to_free(num_processed_tokens)
        return not self._in_flight

    def columns_to_free(self, num_processed_tokens: int) -> int:
        """Leading columns that no step, in flight or to come, will read.

        Args:
            num_processed_tokens: Tokens of all steps whose output has been processed.
        """
        while self._in_flight and self._in_flight[0].start < num_processed_tokens:
            self._first_processed = self._in_flight.popleft().first
        return self._first_processed

    @property
    def num_freed(self) -> int:
        """Leading columns that `columns_to_free` has named so far."""
        return self._first_processed

    @property
    def is_untouched(self) -> bool:
        """Whether no step that compacts was ever scheduled: every column is exact attention KV."""
        return self.first == 0
