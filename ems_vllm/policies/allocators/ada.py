# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps goes to the kv_heads that have the highest scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from ems_vllm.head_shares import whole_pages
from ems_vllm.policies.base import ALLOCATORS, Allocator, Scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@ALLOCATORS.register("ada")
class AdaAllocator(Allocator):
    """Every layer keeps as much; its kv_heads share that by the scores of each compaction.

    Paper: Feng et al. 2024, Ada-KV, arXiv:2407.11550. The entries of all H kv_heads of a layer are
    ranked together, and of the best H * budget a head has as many as are its own:

        entries = safeguard * budget + (1 - safeguard) * (its own of the best H * budget)

    With `rule: floor`, as in NVIDIA/kvpress, a head's own best safeguard * budget are counted among
    the best, and it has as many entries as are its own:

        entries = its own of the best H * budget

    Ours: whole pages, by largest remainder; protected entries are among the best of every head;
    entries that tie for the last places count in part, the same part in each head. A request is
    dealt to anew whenever it is compressed, and a rank of tensor parallelism ranks its own heads
    only.

    Heads are compared by `Scores.compared`.
    """

    papers = (Paper("Ada-KV", "Feng et al.", 2024, "2407.11550"),)

    safeguard: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Part of the budget that all kv_heads have alike (the paper's alpha); 1 makes them equal."""

    rule: Literal["mixed", "floor"] = "mixed"
    """Whether the safeguard is mixed with what scores say, or the least that a kv_head has."""

    def shares(self, num_layers: int) -> None:
        return None

    @property
    def deals_by_scores(self) -> bool:
        return True

    def deal(
        self, context: CompactionContext, scores: Scores, budgets: Sequence[int]
    ) -> torch.Tensor:
        num_heads, page = context.rows_together, context.block_size
        mixed = self.safeguard if self.rule == "mixed" else 0.0
        safe = [int(self.safeguard * budget) for budget in budgets]
        compared = scores.compared
        if self.rule == "floor":
            compared = _safe_first(compared, safe, num_heads)
        above, tied = _best(context, compared, [num_heads * budget for budget in budgets])
        # The only transfer, and so the only synchronisation.
        found = torch.stack([above, tied, context.num_entries, context.num_reserved]).tolist()
        dealt = []
        for request, budget in enumerate(budgets):
            rows = slice(request * num_heads, (request + 1) * num_heads)
            of_above, of_tied, num_entries, num_reserved = (counts[rows] for counts in found)
            part = (num_heads * budget - sum(of_above)) / sum(of_tied)
            best = [own + part * ties for own, ties in zip(of_above, of_tied, strict=True)]
            wanted = [(mixed * budget + (1 - mixed) * count) / page for count in best]
            least = max(1, math.ceil(max(num_reserved) / page))
            most = [count // page for count in num_entries]
            dealt.append(whole_pages(wanted, num_heads * budget // page, least, most))
        return torch.tensor(dealt, dtype=torch.int64)


def _best(
    context: CompactionContext, compared: torch.Tensor, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows have the best entries of their request.

    Args:
        compared: Of Scores.
        counts: By request, how many are the best.

    Returns:
        above, tied: [num_rows], int64 - entries above the last of the best, and as good as that.
    """
    ranked = compared.masked_fill(~context.is_eligible, math.inf)
    # Below any score.
    ranked.masked_fill_(~context.is_entry, -1.0)
    ranked = ranked.view(len(counts), context.rows_together, -1)
    # One by one: the others may be as long, and have another budget.
    lasts = [
        of_request.flatten().topk(count, sorted=False).values.min()
        for of_request, count in zip(ranked, counts, strict=True)
    ]
    last = torch.stack(lasts)[:, None, None]
    return (ranked > last).sum(-1).flatten(), (ranked == last).sum(-1).flatten()


def _safe_first(compared: torch.Tensor, counts: Sequence[int], num_heads: int) -> torch.Tensor:
    """What rows are compared by, with the best of each above everything.

    Args:
        compared: Of Scores.
        counts: By request, how many of each of its rows.
        num_heads: Rows of a request.
    """
    raised = compared.clone()
    for request, count in enumerate(counts):
        rows = raised[:, request * num_heads : (request + 1) * num_heads]
        rows.scatter_(-1, rows.topk(count).indices, math.inf)
    return raised
