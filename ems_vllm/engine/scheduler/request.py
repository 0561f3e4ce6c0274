# SPDX-License-Identifier: Apache-2.0
"""The scheduler's record of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from ems_vllm.engine.scheduler.compaction_ledger import CompactionLedger
    from ems_vllm.engine.totals import Outcome
    from ems_vllm.spans import Span

# Tokens that no request ever has.
NEVER = 2**62


@dataclass
class SchedulerRequest:
    """What the scheduler knows of a request from its first look-up to its end.

    Attributes:
        request: vLLM's.
        ledgers: By compressed group.
        first_hit: Tokens that came from the prefix cache when it was first admitted; None before.
        is_new: Whether no step has been scheduled since it was last admitted.
        num_cached: Tokens that came from the prefix cache at the latest admission.
        quiet_until: A step that ends here or before has nothing to compact, score or record.
        ring_row: Its row of the query ring; None while it needs none.
        score_pages: By compressed group, its private score pages; None while it needs none.
        protected: Spans of positions that stay whole; see Compaction.
        is_measured: Whether what its compactions change is measured.
        prompt_len, compresses_prompt, max_shared_tokens: Of its plans, taken together.
        is_ample: Whether it keeps everything because the pool has room.
        is_spared: Whether it keeps everything because the guard is in force.
        is_off: Whether it keeps everything.
        compresses_within_prompt: Whether there are compactions before the prompt's end.
    """

    request: Request
    ledgers: tuple[CompactionLedger, ...]
    first_hit: int | None = None
    is_new: bool = True
    num_cached: int = 0
    quiet_until: int = 0
    ring_row: int | None = None
    score_pages: list[list[int]] | None = None
    protected: tuple[Span, ...] = ()
    is_ample: bool = False
    is_measured: bool = False
    is_spared: bool = False
    prompt_len: int = field(init=False)
    compresses_prompt: bool = field(init=False)
    is_off: bool = field(init=False)
    compresses_within_prompt: bool = field(init=False)
    max_shared_tokens: int | None = field(init=False)

    def __post_init__(self) -> None:
        plans = [ledger.plan for ledger in self.ledgers]
        self.prompt_len = plans[0].prompt_len
        self.is_off = plans[0].budget_blocks == 0
        self.compresses_prompt = any(plan.compresses_prompt for plan in plans)
        self.compresses_within_prompt = any(plan.num_within_prompt > 0 for plan in plans)
        shared = (plan.max_shared_tokens for plan in plans)
        self.max_shared_tokens = min((limit for limit in shared if limit is not None), default=None)
        self.restart()

    def restart(self) -> None:
        """It gave everything back, and computes from the beginning when it is admitted again."""
        for ledger in self.ledgers:
            ledger.restart()
        self.is_new = True
        self.num_cached = self.quiet_until = 0

    @property
    def outcome_otherwise(self) -> Outcome:
        """What becomes of it, if it is not compressed."""
        if self.is_ample:
            return "ample"
        if self.is_spared:
            return "spared"
        return "off" if self.is_off else "fitted"

    def next_compaction(self, num_processed: int) -> int:
        """Tokens processed when the next compaction of any group falls due; NEVER for none."""
        return min(
            (
                at
                for ledger in self.ledgers
                if (at := ledger.plan.next_compaction(num_processed)) is not None
            ),
            default=NEVER,
        )

    def score_pages_of(self, index: int) -> list[int]:
        """Its private score pages in a compressed group, if it has any."""
        return [] if self.score_pages is None else self.score_pages[index]

    def first_scored_query(self, num_processed: int) -> int:
        """The first query that scores for the next compaction of the prompt.

        It does so for all groups alike, and hence for the one that keeps most of the prompt; and
        as it did when the request was first admitted.
        """
        plans = (ledger.plan for ledger in self.ledgers)
        first = min(
            (plan.first_scored_query(num_processed) for plan in plans if plan.compresses_prompt),
            default=0,
        )
        return max(first, self.num_cached if self.first_hit is None else self.first_hit)

    def waits_for_blocks(self, start: int) -> bool:
        """Whether a step from `start` must wait until blocks of an earlier compaction are back.

        A prompt that is compacted while it is processed would hold ever more of them, the more
        steps are in flight. With one compaction at a time it holds what max_replay_columns says.
        """
        if not self.compresses_within_prompt:
            return False
        num_processed = start - self.request.num_in_flight_tokens
        return any(
            ledger.falls_due(start) and not ledger.is_settled(num_processed)
            for ledger in self.ledgers
        )
