# SPDX-License-Identifier: Apache-2.0
"""Judges what compression changes, by a share of the requests that is measured.

Which requests those are follows from their ids, so a preempted one stays among them. Each is judged
once, when it has ended and all of its measurements have come, by the worst of its compactions.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ems_vllm.confidence import lower_bound, upper_bound

if TYPE_CHECKING:
    from ems_vllm.config.guard import GuardSettings
    from ems_vllm.engine.report import AttentionError
    from ems_vllm.engine.totals import Totals

WINDOW = 200
"""The latest measured requests, by which the share that diverges is judged (ours): where none of
them does, at most 1.5 % of all do."""
CONFIDENCE = 0.95
# Requests that have ended, and of which measurements are still to come. Where none ever do, because
# a stage of a pipeline reports that compresses nothing, they must not pile up.
_MOST_LEAVING = 1024

# The same few numbers, most of the time.
_lower_bound = lru_cache(maxsize=1024)(lower_bound)
_upper_bound = lru_cache(maxsize=1024)(upper_bound)


@dataclass
class _Measured:
    """Of one request.

    Attributes:
        num_due: Compactions of which the measurement is to come.
        mean, worst: The largest of its compactions, each; None before one was measured.
    """

    num_due: int = 0
    mean: float | None = None
    worst: float = 0.0


class Guard:
    """Of one scheduler.

    Args:
        settings: Of the server.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._goes_dense = settings.action == "dense"
        self._requests: dict[str, _Measured] = {}
        # In the order in which they ended.
        self._leaving: dict[str, _Measured] = {}
        self._latest: deque[bool] = deque(maxlen=WINDOW)
        self._is_dense = False
        # By request that was judged: the largest mean, and the worst layer.
        self._news: list[tuple[float, float]] = []

    def measures(self, req_id: str) -> bool:
        """Whether a request is among those that are measured."""
        digest = hashlib.blake2b(req_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self._settings.share * 2**64

    def keeps_whole(self, req_id: str) -> bool:
        """Whether a request that begins now keeps its whole cache.

        Those that are measured do not, or nobody would know when it is over.
        """
        return self._is_dense and not self.measures(req_id)

    def ordered(self, req_id: str) -> None:
        """A compaction of a measured request was ordered."""
        self._requests.setdefault(req_id, _Measured()).num_due += 1

    def measured(self, errors: Iterable[AttentionError]) -> None:
        """Measurements have come, maybe of requests that have ended."""
        for error in errors:
            found = self._requests.get(error.req_id) or self._leaving.get(error.req_id)
            if found is None:
                continue
            found.num_due -= 1
            found.mean = error.mean if found.mean is None else max(found.mean, error.mean)
            found.worst = max(found.worst, error.worst)
            if found.num_due <= 0 and error.req_id in self._leaving:
                del self._leaving[error.req_id]
                self._judge(found)

    def ended(self, req_id: str) -> None:
        """A request has ended, measured or not."""
        found = self._requests.pop(req_id, None)
        if found is None:
            return
        if found.num_due <= 0:
            self._judge(found)
            return
        self._leaving[req_id] = found
        if len(self._leaving) > _MOST_LEAVING:
            del self._leaving[next(iter(self._leaving))]

    def _judge(self, found: _Measured) -> None:
        if found.mean is None:
            return
        self._news.append((found.mean, found.worst))
        if self._settings.limit is None:
            return
        self._latest.append(found.mean > self._settings.limit)
        if not self._goes_dense:
            return
        count, num = sum(self._latest), len(self._latest)
        if self._is_dense:
            # Below where it began, so that it does not come and go with every request.
            self._is_dense = count > self._settings.tolerance * num
        else:
            self._is_dense = _lower_bound(count, num, CONFIDENCE) > self._settings.tolerance

    def count(self, totals: Totals) -> None:
        """Count what is new, and say what holds now."""
        news, self._news = self._news, []
        totals.attention_errors += news
        totals.num_guarded += len(news)
        if self._goes_dense:
            totals.guard_dense = self._is_dense
        if self._settings.limit is None or not self._latest:
            return
        totals.num_diverged += sum(mean > self._settings.limit for mean, _ in news)
        count, num = sum(self._latest), len(self._latest)
        totals.diverged_upper_bound = _upper_bound(count, num, CONFIDENCE)
        totals.diverged_lower_bound = _lower_bound(count, num, CONFIDENCE)
