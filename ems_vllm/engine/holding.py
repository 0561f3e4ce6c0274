# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells the frontend of a request; travels on EngineCoreOutput.

In its `kv_transfer_params`, the one free form there that reaches the frontend: connectors, for whom
it is meant, are refused with compression.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput


@dataclass(frozen=True)
class Holding:
    """How much of a sequence is in the cache, as of its latest compaction.

    Entries are those of a kv_head, in the mean of the compressed KV-cache groups.

    Attributes:
        num_compactions: Steps that compacted it, those after a preemption included.
        num_entries_in: Entries that they found, in all.
        num_entries_kept: Entries that they kept, in all.
        num_entries_gone: Entries that it held without compression and does not hold now.
    """

    num_compactions: int = 0
    num_entries_in: float = 0.0
    num_entries_kept: float = 0.0
    num_entries_gone: float = 0.0


def attach_holding(output: EngineCoreOutput, holding: Holding) -> None:
    """Send `holding` with an output of its request."""
    output.kv_transfer_params = {CONFIG_KEY: asdict(holding)}


def holding_of(kv_transfer_params: dict[str, Any] | None) -> Holding | None:
    """What came with an output; None where nothing new did."""
    if kv_transfer_params is None:
        return None
    found = kv_transfer_params.get(CONFIG_KEY)
    return None if found is None else Holding(**found)
