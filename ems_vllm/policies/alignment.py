# SPDX-License-Identifier: Apache-2.0
"""Several orders of the same entries, made into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


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


def by_quantile(orders: Iterable[Order], is_candidate: Tensor, is_entry: Tensor) -> Tensor:
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
        is_candidate: [1, num_rows, 1, max_entries], bool - entries that compete for the budget.
        is_entry: Like is_candidate - entries that exist.

    Returns:
        Like Order.scores: in (0, 1) for candidates, 1 for other entries, 0 where there is none.
        Within an order, ties go to the lower index.
    """
    claims: Tensor | None = None
    for order in orders:
        claim = _ranks(order.scores, is_candidate)
        if order.first:
            beyond = (claim - order.first).div_(order.share).add_(1)
            claim = torch.where(claim < order.first, claim.div_(order.first), beyond)
            del beyond
        else:
            claim = claim.div_(order.share).add_(1)
        claims = claim if claims is None else torch.minimum(claims, claim, out=claims)
    assert claims is not None
    scores = claims.add_(1).reciprocal_().masked_fill_(~is_candidate, 1.0)
    return scores.masked_fill_(~is_entry, 0.0)


def deviation(scores: Tensor, is_candidate: Tensor) -> Tensor:
    """Standard deviation of scores over the candidates: a unit for sums of different kinds.

    Args:
        scores: Like Order.scores.
        is_candidate: See by_quantile.

    Returns:
        [num_layers, num_rows, num_kv_heads, 1]; 1 where all candidates have the same score.
    """
    count = is_candidate.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~is_candidate, 0.0).sum(-1, keepdim=True).div_(count)
    squares = (scores - mean).square_().masked_fill_(~is_candidate, 0.0)
    deviations = squares.sum(-1, keepdim=True).div_(count).sqrt_()
    return deviations.masked_fill_(deviations == 0, 1.0)


def _ranks(scores: Tensor, is_candidate: Tensor) -> Tensor:
    """Of each entry among the candidates, 0 for the highest score; float32, like scores.

    float32 holds every rank of a row of up to 16 million entries.
    """
    by_score = scores.masked_fill(~is_candidate, -1.0)
    by_score = by_score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores).scatter_(-1, by_score, places.expand_as(by_score))
