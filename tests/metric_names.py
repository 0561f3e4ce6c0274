# SPDX-License-Identifier: Apache-2.0
"""The series that a server offers, by vLLM's metrics and this package's."""

import ast
from collections.abc import Iterator
from pathlib import Path

from ems_vllm.engine.frontend.metric_catalogue import (
    COUNTERS,
    ERRORS,
    GAUGES,
    HISTOGRAM,
    REFUSED,
    REQUESTS,
)

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def our_series() -> set[str]:
    """Of this package."""
    kinds = {
        "counter": [*COUNTERS.values(), REQUESTS, REFUSED],
        "gauge": list(GAUGES.values()),
        "histogram": [HISTOGRAM, ERRORS],
    }
    return {
        metric.name + suffix
        for kind, metrics in kinds.items()
        for metric in metrics
        for suffix in _SUFFIXES[kind]
    }


def series_of_vllm(loggers: Path) -> set[str]:
    """Of vLLM, read from its v1/metrics/loggers.py: importing it takes 12 s.

    They are made by calls of something called counter, gauge or histogram.
    """
    return {
        name + suffix
        for call in ast.walk(ast.parse(loggers.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for kind, suffixes in _SUFFIXES.items()
        if kind in ast.unparse(call.func).lower()
        for name in _named(call)
        for suffix in suffixes
    }


def _named(call: ast.Call) -> Iterator[str]:
    for word in call.keywords:
        if word.arg == "name" and isinstance(word.value, ast.Constant):
            yield str(word.value.value)
