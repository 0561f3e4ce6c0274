# SPDX-License-Identifier: Apache-2.0
"""What the scheduler counts for all requests; travels on SchedulerStats.

In its `kv_connector_stats`, the one free form there that reaches the frontend: connectors, for whom
it is meant, are refused with compression.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

Outcome: TypeAlias = Literal["compressed", "fitted", "off", "ample", "spared"]
"""Of a request: compressed at least once; never longer than what it may hold; sent with
`kv_compression: off`; not compressed because the pool had room; or because the guard was in
force."""


@dataclass
class Totals:
    """Since the statistics before; see the metrics of the same names.

    Entries are those of a kv_head, in the mean of the compressed KV-cache groups.
    """

    num_compactions: int = 0
    num_entries_in: float = 0.0
    num_entries_kept: float = 0.0
    num_entries_merged: float = 0.0
    """This one and the next as a worker measured them: see report.Measured."""
    num_entries_evicted: float = 0.0
    compaction_seconds: list[float] = field(default_factory=list)
    """By step that compacted, as a worker measured it."""
    num_blocks_freed: int = 0
    num_blocks_saved: int = 0
    """Now: see scheduler.dense_pool."""
    num_bytes_freed: int = 0
    """By which the next has grown."""
    num_bytes_saved: int = 0
    """Now: what the saved blocks take on all devices of the engine."""
    num_pool_blocks: int = 0
    """Always: blocks that requests may have."""
    num_preemptions_avoided: int = 0
    """See scheduler.dense_pool."""
    num_ended: dict[Outcome, int] = field(default_factory=dict)
    """Requests by outcome."""
    num_guarded: int = 0
    """Requests that were measured; these and the following: see scheduler.guard."""
    num_diverged: int = 0
    attention_errors: list[tuple[float, float]] = field(default_factory=list)
    """By measured request, of its worst compaction: in the mean of the layers, and of the worst."""
    diverged_lower_bound: float | None = None
    """Now, as the next; None where no request is judged."""
    diverged_upper_bound: float | None = None
    guard_dense: bool | None = None
    """Now: whether requests keep their whole cache; None where they never do."""


def attach_totals(stats: SchedulerStats, totals: Totals) -> None:
    """Send `totals` with a step's statistics."""
    stats.kv_connector_stats = {CONFIG_KEY: asdict(totals)}


def take_totals(stats: SchedulerStats) -> Totals | None:
    """What came with a step's statistics, and leave nothing for a connector's logger to stumble on.

    Returns:
        None where nothing has changed.
    """
    found = (stats.kv_connector_stats or {}).get(CONFIG_KEY)
    if found is None:
        return None
    stats.kv_connector_stats = None
    return Totals(**found)
