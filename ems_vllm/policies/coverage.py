# SPDX-License-Identifier: Apache-2.0
"""How many entries hold a share of what their kv_heads score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.context import SLICE_BYTES, slices

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext

# Of an entry while the best are sought: its rank, sorted with its place, and both once more.
_BYTES_EACH = 40


@dataclass(frozen=True)
class Coverage:
    """Keeps as many entries as hold a share of the score, and no more than the budget (ours).

    PrefixKV (Wang et al. 2024, arXiv:2412.03409) finds one share of accumulated attention that all
    layers hold, offline; deciding it anew for each request, within its budget, is ours. The
    kv_heads of layers that share a block table have equally many entries, so the share is that of
    their mean. A request never keeps less than it did before: of a share of a share of a share
    hardly anything would be left of a prompt after a long answer.

    Attributes:
        share: In (0, 1).
        min_budget: Entries that are kept in any case, where the budget holds so many.
    """

    share: float
    min_budget: int

    def num_blocks(
        self, held: Sequence[float], num_heads: int, block_size: int, reserved: int, before: int
    ) -> int:
        """Blocks to keep of a request: the fewest that hold the share.

        Args:
            held: For 1, 2, ... blocks, shares of score that the best so many hold, summed over
                heads; as many as may be kept.
            num_heads: These are.
            block_size: Tokens per block.
            reserved: Entries that are kept whatever their scores.
            before: Blocks that the request kept at its last compaction; 0 for the first.
        """
        most = len(held)
        entries = max(self.min_budget, reserved)
        least = min(most, max(1, before, math.ceil(entries / block_size)))
        wanted = self.share * num_heads
        return next((n for n in range(least, most) if held[n - 1] >= wanted), most)


def held_shares(
    context: CompactionContext, ranked: torch.Tensor, compared: torch.Tensor
) -> torch.Tensor:
    """Shares of the score that the best entries hold, by how many blocks of them stay.

    A kv_head in which nothing is scored loses nothing.

    Args:
        ranked: What entries are selected by, like Scores.weights.
        compared: What is counted, Scores.compared.

    Returns:
        [num_rows, max_budget / block_size], float64: for 1, 2, ... blocks, summed over layers and
        kv_heads.
    """
    num_best = min(context.max_budget, context.max_entries)
    held = torch.zeros(
        (context.num_rows, num_best // context.block_size),
        dtype=torch.float64,
        device=context.device,
    )
    is_eligible = context.is_eligible.expand_as(ranked)
    at_once = SLICE_BYTES // (_BYTES_EACH * context.num_kv_heads * context.max_entries)
    for layers, rows in slices(range(context.num_layers), context.num_rows, max(1, at_once)):
        is_reserved = ~is_eligible[layers, rows]
        order = ranked[layers, rows].masked_fill(is_reserved, torch.inf)
        # Below any score.
        order.masked_fill_(~context.is_entry[:, rows], -1.0)
        # Of the same rank, the first ones, as ops.select_entries has it.
        best = order.sort(dim=-1, descending=True, stable=True).indices[..., :num_best]
        counted = compared[layers, rows]
        of_blocks = counted.gather(-1, best).unflatten(-1, (-1, context.block_size))
        # In float64, so that what else is padded with it does not decide.
        of_best = of_blocks.sum(-1, dtype=torch.float64).cumsum_(-1)
        total = counted.sum(-1, dtype=torch.float64, keepdim=True)
        shares = of_best.div_(total).clamp_(max=1.0).masked_fill_(total <= 0, 1.0)
        held[rows] += shares.sum((0, 2))
    return held
