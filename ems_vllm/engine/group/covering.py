# SPDX-License-Identifier: Apache-2.0
"""How much of their budgets requests keep, by a coverage; for all layers and ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ems_vllm.engine.group.protection import num_reserved

if TYPE_CHECKING:
    from ems_vllm.engine.group.ranks import Ranks
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.policies.coverage import Coverage


class Covering:
    """Decides for one group.

    Args:
        coverage: What entries must hold.
        num_heads: kv_heads of all layers of the group, on this rank.
        block_size: Tokens per block.
        num_sinks: First entries that always stay.
        ranks: What must be decided together goes to them.
    """

    def __init__(
        self,
        coverage: Coverage,
        num_heads: int,
        block_size: int,
        num_sinks: int,
        ranks: Ranks,
    ) -> None:
        self._coverage = coverage
        self._num_heads = num_heads
        self._block_size = block_size
        self._num_sinks = num_sinks
        self._ranks = ranks

    def decided(self, orders: Sequence[Compaction], shares: torch.Tensor) -> list[Compaction]:
        """Compactions that keep what is needed; waits for the device.

        Args:
            orders: As rows, with all that they may keep.
            shares: Of policies.coverage.held_shares, summed over the layers of this rank.
        """
        of_ranks = self._ranks.gather(shares.cpu())
        # In the order of the ranks, so that all come to the same.
        held = torch.stack(of_ranks).sum(0).tolist()
        num_heads = len(of_ranks) * self._num_heads
        return [
            order._replace(first=order.tail - self._num_blocks(order, of_row, num_heads))
            for order, of_row in zip(orders, held, strict=True)
        ]

    def _num_blocks(self, order: Compaction, held: Sequence[float], num_heads: int) -> int:
        if order.num_kept:
            return order.num_kept
        reserved = num_reserved(order, self._num_sinks, self._block_size)
        of_budget = held[: order.tail - order.first]
        return self._coverage.num_blocks(
            of_budget, num_heads, self._block_size, reserved, order.kept_before
        )
