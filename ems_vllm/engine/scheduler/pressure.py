# SPDX-License-Identifier: Apache-2.0
"""Whether the pool has room for all that runs and waits, where compression is for pressure.

Asked when a request is admitted, and by the scheduler alone: what comes of it is the request's
plan, and workers obey orders as ever. Thresholds and the estimate of answers are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Tokens of an answer, as long as none has ended.
_FIRST_ANSWER = 256
# What the latest answer counts in the mean of their lengths.
_WEIGHT = 0.05


class Pressure:
    """Of one scheduler.

    Args:
        num_blocks: That requests may have.
        usage: Share of them that what runs and waits may come to need before there is pressure.
        blocks_of: Blocks that a request holds at most when it has so many tokens.
        running, waiting: The requests that do.
    """

    def __init__(
        self,
        num_blocks: int,
        usage: float,
        blocks_of: Callable[[Request, int], int],
        running: Callable[[], Iterable[Request]],
        waiting: Callable[[], Iterable[Request]],
    ) -> None:
        self._limit = usage * num_blocks
        self._blocks_of = blocks_of
        self._running = running
        self._waiting = waiting
        self._mean_answer = float(_FIRST_ANSWER)

    def is_high(self, request: Request) -> bool:
        """Whether a request that is about to be admitted, and was counted as dense, is too much.

        Those that were compressed are counted as that, so that only as many are as it takes. A
        prefix that several have in common is counted for each.
        """
        needed, is_counted = 0, False
        for one in chain(self._running(), self._waiting()):
            needed += self._needed(one)
            is_counted = is_counted or one is request
            # However many wait, those that fill the pool are enough.
            if needed > self._limit:
                return True
        return not is_counted and needed + self._needed(request) > self._limit

    def _needed(self, request: Request) -> int:
        prompt_len = request.num_prompt_tokens
        answer = min(request.max_tokens, round(self._mean_answer))
        return self._blocks_of(request, max(request.num_tokens + 1, prompt_len + answer))

    def ended(self, request: Request) -> None:
        """A request has ended, and its answer counts."""
        answer = request.num_tokens - request.num_prompt_tokens
        self._mean_answer += _WEIGHT * (answer - self._mean_answer)
