# SPDX-License-Identifier: Apache-2.0
"""Says in the server's log that requests are being compressed, at most every few seconds."""

from __future__ import annotations

import time
from logging import Logger
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ems_vllm.engine.group.compressed_group import CompressedGroup


class ProgressLog:
    """Logs what was compressed since the last line.

    Args:
        logger: Where to.
        groups: The compressed groups of this worker.
        interval_s: Least time between two lines; vLLM's own statistics come every 10 s.
    """

    def __init__(
        self, logger: Logger, groups: Sequence[CompressedGroup], interval_s: float = 10.0
    ) -> None:
        self._logger = logger
        self._groups = groups
        self._interval_s = interval_s
        self._next_at = 0.0
        self._logged = (0, 0, 0)

    def update(self) -> None:
        """Called once per step."""
        counters = [group.counters for group in self._groups]
        layers = [len(group.layer_names) for group in self._groups]
        total = (
            max((of_group.num_compactions for of_group in counters), default=0),
            _mean([of_group.num_entries_in for of_group in counters], layers),
            _mean([of_group.num_entries_kept for of_group in counters], layers),
        )
        if total == self._logged or time.monotonic() < self._next_at:
            return
        compactions, entries_in, kept = (
            new - old for new, old in zip(total, self._logged, strict=True)
        )
        self._logger.info(
            "KV-cache compression: %d %s, %d entries per kv_head became %d (%d in all since the "
            "start).",
            compactions,
            "compaction" if compactions == 1 else "compactions",
            entries_in,
            kept,
            total[0],
        )
        self._logged = total
        self._next_at = time.monotonic() + self._interval_s


def _mean(entries: Sequence[int], num_layers: Sequence[int]) -> int:
    """Over all layers; groups of one model may keep different numbers."""
    weighted = (count * layers for count, layers in zip(entries, num_layers, strict=True))
    return sum(weighted) // max(1, sum(num_layers))
