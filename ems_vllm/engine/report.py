# SPDX-License-Identifier: Apache-2.0
"""What a worker tells the scheduler about a step; travels on ModelRunnerOutput.

Only where a coverage decides how much of a budget stays: then the scheduler knows no more than that
it is at most the budget, and learns here which columns it may give back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """What a step kept.

    Attributes:
        first_columns: By order of StepOrders.compactions, the first column that is live afterwards.
    """

    first_columns: list[int]


# ModelRunnerOutput is a plain dataclass, so an attribute of ours is pickled with it.
_ATTRIBUTE = "kv_compression_report"


def attach_report(output: Any, report: StepReport) -> None:
    """Send `report` with a ModelRunnerOutput."""
    setattr(output, _ATTRIBUTE, report)


def attached_report(output: Any) -> StepReport | None:
    """The report of a ModelRunnerOutput; None where its step had nothing to report."""
    return getattr(output, _ATTRIBUTE, None)
