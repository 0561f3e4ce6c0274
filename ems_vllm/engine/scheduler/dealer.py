# SPDX-License-Identifier: Apache-2.0
"""Deals out what a request needs to be observed until its compaction, and takes it back.

Two things beside blocks: a row of the query ring for the last `obs_window` tokens before a
compaction, and, where prompt queries are accumulated, private score pages for the columns that came
from the prefix cache, because other requests share those blocks.

Whoever holds pages needs a row, blocks and tokens to reach its compaction, and whoever holds a row
blocks and tokens only; so pages are dealt before rows, and nobody waits in a circle. What was dealt
to a request that is not scheduled after all comes back at once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from ems_vllm.engine.pools import Pool

if TYPE_CHECKING:
    from ems_vllm.engine.scheduler.group_spec import GroupSpec
    from ems_vllm.engine.scheduler.request import SchedulerRequest


class Dealer:
    """Rows and pages of one engine.

    Args:
        specs: Of the compressed groups.
        num_blocks: Blocks of the cache.
        max_num_seqs: Most requests that run at a time.
    """

    def __init__(self, specs: Sequence[GroupSpec], num_blocks: int, max_num_seqs: int) -> None:
        self._block_sizes = [spec.block_size for spec in specs]
        # One row serves a request in all groups.
        self.rows = Pool(0, min(spec.num_ring_rows(num_blocks, max_num_seqs) for spec in specs))
        # Groups share the tensor of their scores, so no two have the same page.
        first = num_blocks
        self.pages = []
        for spec in specs:
            self.pages.append(Pool(first, spec.num_score_pages))
            first += spec.num_score_pages
        # What was dealt in the step that is being scheduled: to whom, and how to undo it.
        self._dealt: list[tuple[SchedulerRequest, Callable[[SchedulerRequest], None]]] = []

    def deal_pages(self, tracked: SchedulerRequest) -> bool:
        """Give a request its score pages, unless it has them; False where there are too few."""
        if tracked.score_pages is not None:
            return True
        dealt: list[list[int]] = []
        for block_size, pool, ledger in zip(
            self._block_sizes, self.pages, tracked.ledgers, strict=True
        ):
            # What was compacted has blocks of its own, and their pages.
            scores = ledger.plan.compresses_prompt and ledger.first == 0
            pages = pool.take(tracked.num_cached // block_size if scores else 0)
            if pages is None:
                for earlier, its_pages in zip(self.pages, dealt, strict=False):
                    earlier.give_back(its_pages)
                return False
            dealt.append(pages)
        tracked.score_pages = dealt
        self._dealt.append((tracked, self.take_back_pages))
        return True

    def deal_row(self, tracked: SchedulerRequest) -> bool:
        """Give a request a row of the query ring, unless it has one; False where none is left."""
        if tracked.ring_row is not None:
            return True
        rows = self.rows.take(1)
        if rows is None:
            return False
        (tracked.ring_row,) = rows
        self._dealt.append((tracked, self.take_back_row))
        return True

    def take_back_pages(self, tracked: SchedulerRequest) -> None:
        if tracked.score_pages is not None:
            for pool, pages in zip(self.pages, tracked.score_pages, strict=True):
                pool.give_back(pages)
            tracked.score_pages = None

    def take_back_row(self, tracked: SchedulerRequest) -> None:
        if tracked.ring_row is not None:
            self.rows.give_back([tracked.ring_row])
            tracked.ring_row = None

    def take_back_unused(self, scheduled: Container[str]) -> None:
        """A step was scheduled: what it dealt to requests that are not part of it comes back.

        They got no blocks, and must not keep others waiting for what they hold.
        """
        for tracked, take_back in self._dealt:
            if tracked.request.request_id not in scheduled:
                take_back(tracked)
        self._dealt.clear()
