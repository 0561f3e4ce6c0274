# SPDX-License-Identifier: Apache-2.0
"""Score pages whose slots say whose score it is, of which group, and which queries made it."""

from __future__ import annotations

from typing import Any

from engine.block_tables import Request
from engine.symbolic_cache import BLOCK_SIZE, Columns

_UNSCORED: tuple[Any, range] = (None, range(0))


class SymbolicScores:
    """The pages of all groups in one store, as in engine/score_store.py.

    Args:
        num_pages: Of all blocks, and the private ones of all groups.
    """

    def __init__(self, num_pages: int) -> None:
        self._pages = [[_UNSCORED] * BLOCK_SIZE for _ in range(num_pages)]

    def score(self, chunk: Any, request: Request) -> None:
        """Accumulate the queries of a ScoredChunk; what is added to must be its own."""
        columns = -(-chunk.seq_len // BLOCK_SIZE)
        assert chunk.block_ids == request.tables[chunk.group_id][:columns], chunk
        assert request.num_computed <= chunk.first_query < chunk.seq_len <= request.end
        pages = [*chunk.score_pages, *chunk.block_ids[len(chunk.score_pages) :]]
        owner, span = (chunk.req_id, chunk.group_id), range(chunk.first_query, chunk.seq_len)
        for position in range(chunk.seq_len):
            page = self._pages[pages[position // BLOCK_SIZE]]
            queries = span
            if position < chunk.num_accumulated:
                found, earlier = page[position % BLOCK_SIZE]
                assert found == owner, (found, chunk)
                assert earlier.stop == span.start, (earlier, chunk)
                queries = range(earlier.start, span.stop)
            page[position % BLOCK_SIZE] = (owner, queries)

    def check(self, order: Any, request: Request, before: Columns, scored_from: int | None) -> None:
        """What a Compaction compresses was scored by the right queries and nobody else's.

        Args:
            before: What is compressed in its group until now.
            scored_from: The first prompt query that counts; None where those of the prompt do not.
        """
        pages = [*order.score_pages, *order.block_ids[len(order.score_pages) :]]
        for entry in range((order.tail - order.first_before) * BLOCK_SIZE):
            found = self._pages[pages[entry // BLOCK_SIZE]][entry % BLOCK_SIZE]
            position = order.first_before * BLOCK_SIZE + entry
            if order.first_before and position < before[1] * BLOCK_SIZE:
                assert entry < order.num_scored, order
                assert found == _carried(order, before), found
            elif scored_from is not None and position < request.prompt_len and not before[0]:
                assert entry < order.num_scored, order
                # Of the queries that count, all that can see the entry.
                owner, queries = found
                assert owner == (order.req_id, order.group_id), (order, position, found)
                seen = range(max(queries.start, position), queries.stop)
                expected = range(max(scored_from, position), request.prompt_len)
                assert seen == expected, (order, position, queries)
            else:
                assert entry >= order.num_scored, order

    def carry(self, order: Any, request: Request) -> None:
        """Kept entries take their scores along."""
        columns = (order.first, order.tail)
        for block_id in request.tables[order.group_id][slice(*columns)]:
            self._pages[block_id] = [_carried(order, columns)] * BLOCK_SIZE


def _carried(order: Any, columns: Columns) -> tuple[Any, range]:
    return ("carried", order.req_id, order.group_id, *columns), range(0)
