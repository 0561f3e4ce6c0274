# SPDX-License-Identifier: Apache-2.0
"""A KV cache whose slots say what was written there, and a model that computes with that.

A symbol is the group it was written for, the tokens up to it and the compression state of every
group that they were computed under; or which compaction of which request produced it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from engine.block_tables import Request

BLOCK_SIZE = 4
VOCABULARY = 50
POISON = ("poison",)

Columns = tuple[int, int]
"""(first, tail) of what is compressed; (0, 0) where nothing is."""
State = tuple[Columns, ...]
"""Columns of every group."""


def prefixes(tokens: Sequence[int], start: int = 0) -> list[int]:
    """For every token a number that stands for all up to it; `start` for those before."""
    return list(itertools.accumulate(tokens, lambda *pair: hash(pair), initial=start))[1:]


def next_token(prefix: int, state: State) -> int:
    """What the model answers to a prefix of which this much is compressed."""
    return hash((prefix, state)) % VOCABULARY


class SymbolicCache:
    """All groups share the blocks, as they share vLLM's pool.

    Args:
        num_blocks: Size of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_checked_slots = 0
        self._blocks: list[list[Any]] = [[POISON] * BLOCK_SIZE for _ in range(num_blocks)]

    def poison(self, block_ids: Sequence[int]) -> None:
        """Whatever was in blocks that are handed out is gone."""
        for block_id in block_ids:
            self._blocks[block_id] = [POISON] * BLOCK_SIZE

    def write(self, request: Request, prefixes: Sequence[int], state: State) -> None:
        """The tokens of a step, computed under a state, in all groups."""
        for group_id, table in enumerate(request.tables):
            for position in range(request.num_computed, request.end):
                block = self._blocks[table[position // BLOCK_SIZE]]
                block[position % BLOCK_SIZE] = kv(request, group_id, prefixes[position], state)

    def compress(self, request: Request, group_id: int, columns: Columns) -> None:
        """What a compaction writes."""
        for column in range(*columns):
            self._blocks[request.tables[group_id][column]] = [
                _compressed(request, group_id, columns, column, offset)
                for offset in range(BLOCK_SIZE)
            ]

    def check(
        self,
        request: Request,
        group_id: int,
        columns: Columns,
        prefixes: Sequence[int],
        states: Sequence[State],
    ) -> None:
        """Compare every slot that attention reads in a group with what must be there.

        Args:
            columns: What is compressed now.
            prefixes: Of every token that is read.
            states: For every token, that under which it must have been computed.
        """
        first, tail = columns
        for position in range(first * BLOCK_SIZE, len(states)):
            column, offset = divmod(position, BLOCK_SIZE)
            if column < tail:
                expected = _compressed(request, group_id, columns, column, offset)
            else:
                expected = kv(request, group_id, prefixes[position], states[position])
            found = self._blocks[request.tables[group_id][column]][offset]
            assert found == expected, (
                f"{request.req_id}: group {group_id} column {column} offset {offset} holds "
                f"{found}, must hold {expected}"
            )
            self.num_checked_slots += 1


def kv(request: Request, group_id: int, prefix: int, state: State) -> tuple[Any, ...]:
    """What a token writes: its prefix, and the columns it attended to."""
    owner = request.req_id if max(state) > (0, 0) else None
    return ("kv", group_id, prefix, state, owner)


def _compressed(
    request: Request, group_id: int, columns: Columns, column: int, offset: int
) -> tuple[Any, ...]:
    return ("compressed", group_id, request.req_id, *columns, column, offset)
