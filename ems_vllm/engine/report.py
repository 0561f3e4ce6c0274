# SPDX-License-Identifier: Apache-2.0
"""What a worker tells the scheduler; travels on ModelRunnerOutput.

Where a coverage decides how much of a budget stays, the scheduler knows no more than that it is at
most the budget, and learns here which columns it may give back. What compactions took and merged
is for statistics, and comes when the device is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class AttentionError(NamedTuple):
    """What a compaction changed in the outputs of attention: see group.divergence.

    Attributes:
        req_id: Of the request that was compacted.
        mean, worst: Relative errors in the mean of the layers, and of the one that changed most.
    """

    req_id: str
    mean: float
    worst: float


@dataclass(frozen=True)
class Measured:
    """What compactions took and did since the report before, as one worker sees it.

    Entries are those of a kv_head, in the mean of the compressed KV-cache groups and of the
    kv_heads that this worker holds.

    Attributes:
        seconds: By step that compacted.
        num_entries_merged: Entries that were merged into kept ones.
        num_entries_evicted: Entries that were dropped.
        attention_errors: Of the compactions that the scheduler has measured, in the compressed
            layers and the kv_heads that this worker holds.
    """

    seconds: list[float]
    num_entries_merged: float
    num_entries_evicted: float
    attention_errors: Sequence[AttentionError] = ()


@dataclass(frozen=True)
class StepReport:
    """What a step kept, and what was measured.

    Attributes:
        first_columns: By order of StepOrders.compactions, the first column that is live afterwards;
            empty where no coverage decides.
        measured: Of steps up to this one; None where nothing has ended since the report before.
    """

    first_columns: list[int]
    measured: Measured | None = None


# ModelRunnerOutput is a plain dataclass, so an attribute of ours is pickled with it.
_ATTRIBUTE = "kv_compression_report"


def attach_report(output: Any, report: StepReport) -> None:
    """Send `report` with a ModelRunnerOutput."""
    setattr(output, _ATTRIBUTE, report)


def attached_report(output: Any) -> StepReport | None:
    """The report of a ModelRunnerOutput; None where its step had nothing to report."""
    return getattr(output, _ATTRIBUTE, None)
