# SPDX-License-Identifier: Apache-2.0
"""Several orders of the same entries, made into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm import ops

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext


@dataclass(frozen=True)
class Order:
    """One opinion on which entries matter.

    Attributes:
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32, >= 0 - higher is kept.
        share: Of whatever budget there is, the part that this order fills, > 0.
        first: Entries that it fills before any other order has its turn.
    """

    scores: Tensor
    share: float
    first: int = 0


def by_quantile(orders: Iterable[Order], context: CompactionContext) -> Tensor:
    """Scores under which every order fills its share of the budget, whatever the budget is (ours).

    Scores of different kinds have no common unit: aligned by their means, the one with the heavier
    tail takes nearly all. Ranks have one. An order wants its entry of rank r (0 is the best) once
    the budget has room for

        claim = r / first                       of the first `first` ranks,
                1 + (r - first) / share         of the others

    entries, and an entry is wanted where the first order wants it. What several orders want leaves
    room that all of them share.

    A row's result does not depend on how much longer another row of the batch is.

    Args:
        orders: At least one; each is dropped before the next is asked for.
        context: Its eligible entries compete for the budget.

    Returns:
        Like Order.scores: 1 / (1 + claim) for entries that compete, 1 for others, 0 where there is
        none. Within an order, ties go to the lower index.
    """
    weights = context.new_scores().zero_()
    for order in orders:
        ops.rank_entries(
            order.scores,
            context.num_entries,
            context.num_protected,
            context.is_protected,
            order.share,
            order.first,
            weights,
        )
    return weights


def deviation(scores: Tensor, is_candidate: Tensor) -> Tensor:
    """Standard deviation of scores over the candidates: a unit for sums of different kinds.

    Args:
        scores: Like Order.scores; anything where there is no candidate.
        is_candidate: [1 or num_layers, num_rows, 1 or num_kv_heads, max_entries], bool.

    Returns:
        [num_layers, num_rows, num_kv_heads, 1]; 1 where all candidates have the same score.
    """
    is_other = ~is_candidate
    count = is_candidate.sum(-1, keepdim=True).clamp_(min=1)
    # No product: what is no candidate may hold anything, NaN included.
    mean = scores.masked_fill(is_other, 0.0).sum(-1, keepdim=True).div_(count)
    squares = (scores - mean).square_().masked_fill_(is_other, 0.0)
    deviations = squares.sum(-1, keepdim=True).div_(count).sqrt_()
    return deviations.masked_fill_(deviations == 0, 1.0)
