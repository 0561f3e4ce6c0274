# SPDX-License-Identifier: Apache-2.0
"""Which compactions of a request have surely happened, as the scheduler can know it."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan


@dataclass
class CompactionLedger:
    """Follows the steps of one request from "scheduled" to "output processed".

    A worker compacts at the start of a step, from the number of tokens processed before it. The
    columns that this makes free may be handed out only when that step's output has been processed.
    "More than P tokens processed" does not say so: a step may start before P and end beyond it (a
    resumed prefill), and then nothing has been compacted yet. So the starts are recorded.

    Attributes:
        plan: The request's plan, the same function that the worker computes.
    """

    plan: "CompressionPlan"
    _in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    _first_scheduled: int = 0
    _first_processed: int = 0

    def step_scheduled(self, start: int) -> None:
        """A step that begins with `start` processed tokens was handed to the workers."""
        first, _ = self.plan.columns(start)
        if first > self._first_scheduled:
            self._first_scheduled = first
            self._in_flight.append((start, first))

    def columns_to_free(self, num_processed_tokens: int) -> int:
        """Leading columns that no step, in flight or to come, will read.

        Args:
            num_processed_tokens: Tokens of all steps whose output has been processed.
        """
        while self._in_flight and self._in_flight[0][0] < num_processed_tokens:
            self._first_processed = self._in_flight.popleft()[1]
        return self._first_processed

    @property
    def is_untouched(self) -> bool:
        """Whether no step that compacts was ever scheduled: every column is exact attention KV."""
        return self._first_scheduled == 0

    @property
    def is_prompt_compacted(self) -> bool:
        """Whether the first compaction has been processed."""
        return self._first_processed > 0
