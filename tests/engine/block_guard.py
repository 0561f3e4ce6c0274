# SPDX-License-Identifier: Apache-2.0
"""Asserts, while an engine runs, that what is compressed belongs to one request only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from engine.harness import BLOCK_SIZE, EngineProbe

from ems_vllm.engine.group.compactor import Compactor
from ems_vllm.engine.orders import Compaction


@dataclass
class Checked:
    """How many blocks were looked at.

    Attributes:
        targets: Blocks that a compaction was about to write.
        live: Blocks from the first live column on, after every scheduling step.
    """

    targets: int = 0
    live: int = 0


@contextmanager
def guarded(probe: EngineProbe) -> Iterator[Checked]:
    """Fail where a block that is compressed, or will be, can be hit or is in use twice."""
    checked = Checked()
    compact, schedule = Compactor.compact, probe.scheduler.schedule

    def check(req_id: str, block: Any) -> None:
        assert block.ref_cnt == 1, (req_id, block)
        assert block.block_hash is None, (req_id, block)

    def guarded_compact(self: Compactor, orders: Sequence[Compaction]) -> dict[str, int]:
        for order in orders:
            columns = slice(order.first - order.first_before, order.tail - order.first_before)
            for block_id in order.block_ids[columns]:
                check(order.req_id, probe.pool.blocks[block_id])
                checked.targets += 1
        return compact(self, orders)

    def guarded_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for manager in probe.managers:
            for req_id, tracked in probe.scheduler.planner.requests.items():
                if not tracked.compresses_prompt:
                    continue
                first = tracked.max_shared_tokens // BLOCK_SIZE
                for block in manager.req_to_blocks.get(req_id, ())[first:]:
                    if not block.is_null:
                        check(req_id, block)
                        checked.live += 1
        return output

    with (
        mock.patch.object(Compactor, "compact", guarded_compact),
        mock.patch.object(probe.scheduler, "schedule", guarded_schedule),
    ):
        yield checked
    assert checked.targets, "nothing was compressed"
