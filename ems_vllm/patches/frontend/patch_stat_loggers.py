# SPDX-License-Identifier: Apache-2.0
"""StatLoggerManager: count compactions where vLLM counts its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats


def _wrap_record(original: Callable[..., Any]) -> Callable[..., Any]:
    from ems_vllm.engine.frontend import metrics

    def record(
        self: StatLoggerManager,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        metrics.record(self, scheduler_stats, engine_idx)
        original(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    return record


PATCHES = (
    Patch(
        target="vllm.v1.metrics.loggers:StatLoggerManager.record",
        wrap=_wrap_record,
        source_sha256=by_version(
            "fdb104e1ff79e573a57791071e60691ad8120bc267d9c184e27bc1dd03e1b569"
        ),
        process=Process.FRONTEND,
        reason=(
            "The one free form in SchedulerStats is a KV connector's, and vLLM's loggers fail on "
            "it where there is no connector. A plugin's logger is not asked first by every engine."
        ),
        upstream="none filed",
        remove_when="schedulers can send statistics of their own to the loggers of plugins",
    ),
)
