# SPDX-License-Identifier: Apache-2.0
"""How much room workers hold to observe queries, as scheduler and workers both compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ems_vllm.plan import PlanSettings

# Constants of the ring's size (ours). Rows for prompts that end in the same step or two:
_MIN_ROWS = 8
# Times as many rows as decoding requests use on average:
_SPARE = 1.5
# Entries of a request where the budget is a fraction of the prompt:
_TYPICAL_BUDGET = 1024


@dataclass(frozen=True)
class ObservationSettings:
    """What of the queries workers keep until a compaction; the same for all layers.

    Attributes:
        obs_window: Last queries that are recorded before a compaction; 0 records none.
        score_tokens: Capacity, in tokens, of the private score pages, at least max_model_len;
            None where no scores are accumulated.
        ring_rows: Requests whose queries are recorded at a time; None derives it.
    """

    obs_window: int
    score_tokens: int | None
    ring_rows: int | None

    def num_score_pages(self, block_size: int) -> int:
        """Private score pages of a layer: for columns that came from the prefix cache.

        Args:
            block_size: Tokens per block.
        """
        return -(-(self.score_tokens or 0) // block_size)

    def num_ring_rows(self, settings: PlanSettings, block_size: int, blocks: int, most: int) -> int:
        """Rows of the query ring of a group.

        A decoding request needs one for `obs_window` of every `recompress_interval` tokens, and a
        pool of blocks holds only so many requests, so the rows grow with the blocks: a fixed small
        share of the cache, whatever `most` is.

        Args:
            settings: Of the plan.
            block_size: Tokens per block.
            blocks: Blocks of the cache.
            most: Most requests that run at a time.
        """
        if self.obs_window == 0:
            return 0
        if self.ring_rows is not None:
            return min(self.ring_rows, most)
        rows = _MIN_ROWS + blocks * self.rows_per_block(settings, block_size)
        return min(most, int(rows))

    def rows_per_block(self, settings: PlanSettings, block_size: int) -> float:
        """How the rows of the query ring grow with the blocks of the cache."""
        interval = settings.recompress_interval
        if interval == 0:
            return 0.0
        entries = (settings.budget or _TYPICAL_BUDGET) + settings.recent_window + interval
        # With levels, a column takes a block of each, and holds the entries of one.
        entries *= sum(1 for _ in settings.levels())
        recording = min(1.0, _SPARE * self.obs_window / interval)
        return recording * block_size / entries


def score_tokens(configured: int | None, longest_hit: int, max_num_batched_tokens: int) -> int:
    """Capacity of the private score pages, in tokens.

    Unless configured: room for one prefix of the greatest length and for the shorter ones that
    can finish their prefill in the same step (ours).
    """
    if configured is not None:
        return configured
    return longest_hit + 4 * max_num_batched_tokens
