# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of compression, on vLLM's own page and with its labels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, get_args

import prometheus_client

from ems_vllm.engine.frontend.metric_catalogue import (
    COUNTERS,
    ERRORS,
    GAUGES,
    HISTOGRAM,
    REFUSED,
    REQUESTS,
)
from ems_vllm.engine.totals import Outcome, take_totals

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from ems_vllm.engine.totals import Totals

_LABELS = ["model_name", "engine"]
# Seconds.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Relative errors.
_ERROR_BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
# In the order of Totals.attention_errors.
_LAYERS = ("mean", "worst")
# Gauges that tell of requests in any case; those of a guard are there where one is.
_ALWAYS_SHOWN = ("num_blocks_held", "num_blocks_saved", "num_bytes_saved")
_OF_GUARD = ("diverged_lower_bound", "diverged_upper_bound", "guard_dense")


class Metrics:
    """The metrics of this process.

    Args:
        counter, gauge, histogram: Of prometheus_client, or what a server has in their place.
    """

    def __init__(self, counter: Any, gauge: Any, histogram: Any) -> None:
        self._counters = {
            field: counter(metric.name, metric.help, _LABELS) for field, metric in COUNTERS.items()
        }
        self._gauges = {
            field: gauge(metric.name, metric.help, _LABELS, multiprocess_mode="mostrecent")
            for field, metric in GAUGES.items()
        }
        self._requests = counter(REQUESTS.name, REQUESTS.help, [*_LABELS, "outcome"])
        self._refused = counter(REFUSED.name, REFUSED.help, ["model_name", "reason"])
        self._seconds = histogram(HISTOGRAM.name, HISTOGRAM.help, _LABELS, buckets=_BUCKETS)
        self._errors = histogram(
            ERRORS.name, ERRORS.help, [*_LABELS, "layers"], buckets=_ERROR_BUCKETS
        )
        # By the labels of an engine, blocks that its requests may have; 0 for not yet known.
        self._pools: dict[tuple[Any, ...], int] = {}

    def record(self, stats: SchedulerStats, labels: list[Any]) -> None:
        """Count what came with the statistics of a step of an engine."""
        of_engine = tuple(labels)
        if of_engine not in self._pools:
            self._begin(labels)
            self._pools[of_engine] = 0
        totals = take_totals(stats)
        if totals is not None:
            self._count(totals, labels)
            self._pools[of_engine] = totals.num_pool_blocks
        if num_blocks := self._pools[of_engine]:
            self._set("num_blocks_held", round(stats.kv_cache_usage * num_blocks), labels)

    def _begin(self, labels: list[Any]) -> None:
        """Show what has not happened as 0."""
        shown = (self._gauges[field] for field in _ALWAYS_SHOWN)
        for metric in (*self._counters.values(), *shown, self._seconds):
            metric.labels(*labels)
        for layers in _LAYERS:
            self._errors.labels(*labels, layers)
        for outcome in get_args(Outcome):
            self._requests.labels(*labels, outcome)

    def _count(self, totals: Totals, labels: list[Any]) -> None:
        for field, counter in self._counters.items():
            counter.labels(*labels).inc(getattr(totals, field))
        for field in ("num_blocks_saved", "num_bytes_saved"):
            self._set(field, getattr(totals, field), labels)
        for field in _OF_GUARD:
            if (value := getattr(totals, field)) is not None:
                self._set(field, value, labels)
        for errors in totals.attention_errors:
            for layers, error in zip(_LAYERS, errors, strict=True):
                self._errors.labels(*labels, layers).observe(error)
        for outcome, count in totals.num_ended.items():
            self._requests.labels(*labels, outcome).inc(count)
        for seconds in totals.compaction_seconds:
            self._seconds.labels(*labels).observe(seconds)

    def _set(self, field: str, value: float, labels: list[Any]) -> None:
        self._gauges[field].labels(*labels).set(value)

    def refused(self, model_name: str, reason: str) -> None:
        """A request was answered with an HTTP 400."""
        self._refused.labels(model_name, reason).inc()


@functools.cache
def _metrics(counter: Any, gauge: Any, histogram: Any) -> Metrics:
    # A name can be registered once in a process, and vLLM makes new loggers when it scales.
    return Metrics(counter, gauge, histogram)


def record(manager: StatLoggerManager, stats: SchedulerStats | None, engine: int | None) -> None:
    """Count, and leave vLLM's loggers nothing that they do not know.

    Args:
        manager: Of the loggers.
        stats: Of a step, if there are any.
        engine: Whose.
    """
    if stats is None:
        return
    logger = _prometheus(manager)
    if logger is None:
        take_totals(stats)
        return
    metrics = _metrics(logger._counter_cls, logger._gauge_cls, logger._histogram_cls)
    metrics.record(stats, logger.per_engine_labelvalues[engine or 0])


def record_refusal(vllm_config: VllmConfig, reason: str) -> None:
    """Count a request that is refused before any engine knows of it.

    Args:
        vllm_config: Of the server.
        reason: One of few.
    """
    own = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    _metrics(*own).refused(str(vllm_config.model_config.served_model_name), reason)


def _prometheus(manager: StatLoggerManager) -> PrometheusStatLogger | None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    found = (one for one in manager.stat_loggers if isinstance(one, PrometheusStatLogger))
    return next(found, None)
