# SPDX-License-Identifier: Apache-2.0
"""The series that a server offers, read from the sources that register them."""

import ast
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}

# Of the list in docs/monitoring.md, what this package's metrics.py does not register yet; once it
# does, the line can go.
ANNOUNCED = {
    "ems_vllm:entries_merged_total",
    "ems_vllm:entries_evicted_total",
    "ems_vllm:kv_bytes_freed_total",
    "ems_vllm:requests_refused_total",
    "ems_vllm:preemptions_avoided_total",
    "ems_vllm:blocks_held",
    "ems_vllm:kv_bytes_saved",
    "ems_vllm:compaction_time_seconds_bucket",
    "ems_vllm:compaction_time_seconds_sum",
    "ems_vllm:compaction_time_seconds_count",
}


def series(source: Path) -> set[str]:
    """Names of what a file registers: by calls of something called counter, gauge or histogram,
    whose first argument, or `name`, is a string with a colon."""
    return {
        name + suffix
        for call in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for kind, suffixes in _SUFFIXES.items()
        if kind in ast.unparse(call.func).lower()
        for name in _named(call)
        for suffix in suffixes
    }


def _named(call: ast.Call) -> Iterator[str]:
    arguments = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
    for argument in arguments:
        if isinstance(argument, ast.Constant) and ":" in str(argument.value):
            yield str(argument.value)
