# SPDX-License-Identifier: Apache-2.0
"""Score pages whose slots say whose score it is, of which group, and which queries made it."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.block_tables import Request
from engine.symbolic_cache import BLOCK_SIZE, Columns

_UNSCORED: tuple[Any, range] = (None, range(0))


class Scoring(NamedTuple):
    """Which of the prompt's queries score for a compaction.

    Attributes:
        carries: Whether entries that were kept before have the scores of earlier queries, too.
        of_kept, of_new: The first one for entries that were kept before, and for the others.
    """

    carries: bool
    of_kept: int
    of_new: int


class SymbolicScores:
    """The pages of all groups in one store, as in engine/group/score_store.py.

    Args:
        num_pages: Of all blocks, and the private ones of all groups.
    """

    def __init__(self, num_pages: int) -> None:
        self._pages = [[_UNSCORED] * BLOCK_SIZE for _ in range(num_pages)]

    def score(self, chunk: Any, request: Request) -> None:
        """Accumulate the queries of a ScoredChunk; what is added to must be its own."""
        columns = slice(chunk.first_column, -(-chunk.seq_len // BLOCK_SIZE))
        assert chunk.block_ids == request.tables[chunk.group_id][columns], chunk
        assert request.num_computed <= chunk.first_query < chunk.seq_len <= request.end
        pages = [*chunk.score_pages, *chunk.block_ids[len(chunk.score_pages) :]]
        span = range(chunk.first_query, chunk.seq_len)
        for entry in range(chunk.seq_len - chunk.first_column * BLOCK_SIZE):
            page, slot = self._pages[pages[entry // BLOCK_SIZE]], entry % BLOCK_SIZE
            owner, queries = (chunk.req_id, chunk.group_id), span
            if entry < chunk.num_accumulated:
                found, earlier = page[slot]
                if found == ("carried", *owner, chunk.first_column):
                    # What was kept; of the queries, those since.
                    owner = found
                assert found == owner, (found, chunk)
                if earlier:
                    assert earlier.stop == span.start, (earlier, chunk)
                    queries = range(earlier.start, span.stop)
            page[slot] = (owner, queries)

    def check(self, order: Any, before: Columns, scoring: Scoring | None) -> None:
        """What a Compaction compresses was scored by the right queries and nobody else's.

        Args:
            before: What is compressed in its group until now.
            scoring: Of the prompt's queries; None where none counts.
        """
        pages = [*order.score_pages, *order.block_ids[len(order.score_pages) :]]
        carried = _carried(order, before)
        for entry in range((order.tail - order.first_before) * BLOCK_SIZE):
            found = self._pages[pages[entry // BLOCK_SIZE]][entry % BLOCK_SIZE]
            position = order.first_before * BLOCK_SIZE + entry
            is_kept = order.first_before > 0 and position < before[1] * BLOCK_SIZE
            if scoring is None:
                assert (entry < order.num_scored) == is_kept, order
                assert not is_kept or found == carried, found
                continue
            assert entry < order.num_scored, order
            if is_kept:
                tag = carried[0] if scoring.carries else (order.req_id, order.group_id)
                assert found == (tag, range(scoring.of_kept, order.num_computed)), (order, found)
                continue
            # Of the queries that count, all that can see the entry.
            owner, queries = found
            assert owner == (order.req_id, order.group_id), (order, position, found)
            seen = range(max(queries.start, position), queries.stop)
            expected = range(max(scoring.of_new, position), order.num_computed)
            assert seen == expected, (order, position, queries)

    def carry(self, order: Any, request: Request) -> None:
        """Kept entries take their scores along."""
        columns = (order.first, order.tail)
        for block_id in request.tables[order.group_id][slice(*columns)]:
            self._pages[block_id] = [_carried(order, columns)] * BLOCK_SIZE


def _carried(order: Any, columns: Columns) -> tuple[Any, range]:
    return ("carried", order.req_id, order.group_id, columns[0]), range(0)
