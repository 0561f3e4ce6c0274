# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of compression, on vLLM's own page and with its labels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ems_vllm.engine.totals import take_totals

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

_LABELS = ["model_name", "engine"]
_ENTRIES = "of a kv_head, in the mean of the compressed KV-cache groups"


class Metrics:
    """The metrics of this process.

    Args:
        counter, gauge: Of prometheus_client, or what a server has in their place.
    """

    def __init__(self, counter: Any, gauge: Any) -> None:
        self._compactions = counter(
            "ems_vllm:compactions",
            "Compactions: steps that compressed a request, counted by request.",
            _LABELS,
        )
        self._entries_in = counter(
            "ems_vllm:entries_in", f"Entries that compactions have found, {_ENTRIES}.", _LABELS
        )
        self._entries_kept = counter(
            "ems_vllm:entries_kept", f"Entries that compactions have kept, {_ENTRIES}.", _LABELS
        )
        self._blocks_freed = counter(
            "ems_vllm:blocks_freed", "Blocks that compactions have given back.", _LABELS
        )
        self._blocks_saved = gauge(
            "ems_vllm:blocks_saved",
            "Blocks that running requests would hold besides, were they not compressed.",
            _LABELS,
            multiprocess_mode="mostrecent",
        )
        self._requests = counter(
            "ems_vllm:requests",
            "Requests that have ended, by outcome: compressed; fitted, being never longer than "
            "what may be held; off, as they asked.",
            [*_LABELS, "outcome"],
        )

    def record(self, stats: SchedulerStats, labels: list[Any]) -> None:
        """Count what came with the statistics of a step."""
        totals = take_totals(stats)
        if totals is None:
            return
        self._compactions.labels(*labels).inc(totals.num_compactions)
        self._entries_in.labels(*labels).inc(totals.num_entries_in)
        self._entries_kept.labels(*labels).inc(totals.num_entries_kept)
        self._blocks_freed.labels(*labels).inc(totals.num_blocks_freed)
        self._blocks_saved.labels(*labels).set(totals.num_blocks_saved)
        for outcome, count in totals.num_ended.items():
            self._requests.labels(*labels, outcome).inc(count)


@functools.cache
def _metrics(counter: Any, gauge: Any) -> Metrics:
    # A name can be registered once in a process, and vLLM makes new loggers when it scales.
    return Metrics(counter, gauge)


def record(manager: StatLoggerManager, stats: SchedulerStats | None, engine: int | None) -> None:
    """Count, and leave vLLM's loggers nothing that they do not know.

    Args:
        manager: Of the loggers.
        stats: Of a step, if there are any.
        engine: Whose.
    """
    if stats is None or not stats.kv_connector_stats:
        return
    logger = _prometheus(manager)
    if logger is None:
        take_totals(stats)
        return
    labels = logger.per_engine_labelvalues[engine or 0]
    _metrics(logger._counter_cls, logger._gauge_cls).record(stats, labels)


def _prometheus(manager: StatLoggerManager) -> PrometheusStatLogger | None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    found = (one for one in manager.stat_loggers if isinstance(one, PrometheusStatLogger))
    return next(found, None)
