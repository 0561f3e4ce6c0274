# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells the workers about a step; travels on SchedulerOutput.

Plain data that pickles: block ids, columns and rows, nothing that a worker would have to derive.
Where a coverage decides how much of a budget stays, only a worker knows what it kept; then columns
are those of the plan, of which a worker may hold fewer (worker/kept_columns.py).
Columns are those of vLLM's block table, positions those of the sequence; a group is named by its
index among the KV-cache groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ems_vllm.spans import Span


class Compaction(NamedTuple):
    """Compress columns [first_before, tail) of a request into [first, tail), before the forward.

    Attributes:
        req_id: vLLM's.
        group_id: Whose columns.
        first_before: First live column until now; 0 before the first compaction.
        first, tail: Columns that hold the kept entries afterwards.
        num_computed: Tokens processed before the step; the live columns hold them.
        block_ids: Block of every live column, from `first_before` on.
        score_pages: Private score pages of the leading live columns; of the others, and of all
            where this is empty, page = block id.
        num_scored: Leading live entries that have an accumulated score.
        num_represented: Tokens that the recorded queries stand for; see CompactionContext.
        ring_row: Where the queries are recorded; -1 where none are.
        num_queries: Recorded queries; the newest is that of token `num_computed - 1`.
        prompt_blocks: Blocks of the prompt that are compressed; what kv_heads own depends on it.
        protected: Spans of positions whose entries stay as they are, in order and apart; the same
            at every compaction of a request.
        num_kept: Of the columns [first, tail), those that hold kept entries, the last ones, because
            it was decided so before the request was preempted; 0 where all do, or a coverage is to
            decide.
        kept_before: Where it is to decide, columns that hold what the compaction before kept, which
            a worker knows; 0 for the first.
        is_measured: Whether what the compaction changes is measured; such a request is compacted by
            itself, on every rank.
    """

    req_id: str
    group_id: int
    first_before: int
    first: int
    tail: int
    num_computed: int
    block_ids: list[int]
    score_pages: list[int]
    num_scored: int
    num_represented: int
    ring_row: int
    num_queries: int
    prompt_blocks: int
    protected: tuple[Span, ...] = ()
    num_kept: int = 0
    kept_before: int = 0
    is_measured: bool = False


class ScoredChunk(NamedTuple):
    """Accumulate the attention of prompt queries [first_query, seq_len) of a request.

    Attributes:
        req_id: vLLM's.
        group_id: In whose layers.
        first_query: Position of the first query that scores in this step.
        seq_len: Position after the last one.
        first_column: First live column.
        num_accumulated: Leading live entries that have a score to add to; those of the others, left
            behind by an earlier owner of the page, are overwritten.
        block_ids: Block of every column from `first_column` up to `seq_len`.
        score_pages: As in Compaction.
    """

    req_id: str
    group_id: int
    first_query: int
    seq_len: int
    first_column: int
    num_accumulated: int
    block_ids: list[int]
    score_pages: list[int]


class RecordedQueries(NamedTuple):
    """Record the queries of the last `num_queries` tokens of a request's step.

    The query at position p goes to column p % obs_window of row `ring_row`.
    """

    req_id: str
    ring_row: int
    num_queries: int


@dataclass(frozen=True)
class StepOrders:
    """What a step does beyond vLLM's own work.

    Attributes:
        step: Number of the step; consecutive, so that a lost message is noticed.
        ended: Requests that gave their blocks back since the step before: finished or preempted.
        admitted: Requests that begin, or begin again, with this step.
        starts: Tokens processed before the step, for every request of `num_scheduled_tokens` in
            its order.
        first_columns: By group, for the same requests: the first live column in this step, after
            its compactions. What a worker holds must agree.
        freed_columns: By group, for the same requests: leading columns that were given back. Only
            where a coverage decides; else these are `first_columns` of an earlier step.
        compactions, scored, recorded: The work.
    """

    step: int
    ended: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    first_columns: dict[int, list[int]] = field(default_factory=dict)
    freed_columns: dict[int, list[int]] = field(default_factory=dict)
    compactions: list[Compaction] = field(default_factory=list)
    scored: list[ScoredChunk] = field(default_factory=list)
    recorded: list[RecordedQueries] = field(default_factory=list)


# SchedulerOutput is a plain dataclass, so an attribute of ours is pickled with it.
_ATTRIBUTE = "kv_compression_orders"


def attach(output: Any, orders: StepOrders) -> None:
    """Send `orders` with a SchedulerOutput."""
    setattr(output, _ATTRIBUTE, orders)


def attached(output: Any) -> StepOrders | None:
    """The orders of a SchedulerOutput; None where no compressing scheduler made it."""
    return getattr(output, _ATTRIBUTE, None)
