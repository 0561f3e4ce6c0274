# SPDX-License-Identifier: Apache-2.0
"""Pages of one kv_head whose slots say what they hold, and a policy that compresses them.

They lie in tensors, so that the engine's own code finds them. The number in a slot stands for a
symbol, a layer and a kv_head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine.symbolic_cache import BLOCK_SIZE, POISON

_POISONED = -1
# Of a wave of compactions, so that some hold one request and others several.
_WAVE_ENTRIES = 60


class Symbols:
    """A number for each symbol, in each layer, of each kv_head."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        self._shape = (num_layers, num_heads)
        self._stride = num_layers * num_heads
        self._numbers: dict[Any, int] = {}
        self._known: list[Any] = []

    def numbers(self, symbols: Sequence[Any]) -> np.ndarray:
        """[num_layers, num_heads, num_symbols], int64."""
        numbers = np.array([self._number(symbol) for symbol in symbols], np.int64)
        places = np.arange(self._stride).reshape(*self._shape, 1)
        return numbers * self._stride + places

    def check(self, found: np.ndarray, expected: np.ndarray, where: str) -> None:
        """Fail where two rows of numbers differ."""
        assert len(found) == len(expected), f"{where}: {len(found)} entries, not {len(expected)}"
        wrong = np.flatnonzero(found != expected)
        assert not len(wrong), (
            f"{where}: entry {wrong[0]} is {self._named(found[wrong[0]])}, must be "
            f"{self._named(expected[wrong[0]])}"
        )

    def _number(self, symbol: Any) -> int:
        if symbol not in self._numbers:
            self._numbers[symbol] = len(self._known)
            self._known.append(symbol)
        return self._numbers[symbol]

    def _named(self, number: int) -> Any:
        if number == _POISONED:
            return POISON
        index, place = divmod(int(number), self._stride)
        return (self._known[index], *divmod(place, self._shape[1]))


class SymbolicPages:
    """What the layers of one KV-cache group hold.

    Args:
        num_layers: Of the group.
        num_heads: kv_heads of a layer.
        num_blocks: Size of the pool.
        num_score_pages: All there are, those of the blocks included; 0 where nothing is scored.

    Attributes:
        cache: [num_layers, num_blocks, num_heads, BLOCK_SIZE, 1], int64.
        scores: [num_layers, num_score_pages, num_heads, BLOCK_SIZE], int64; or None.
    """

    def __init__(
        self, num_layers: int, num_heads: int, num_blocks: int, num_score_pages: int
    ) -> None:
        size = (num_layers, num_blocks, num_heads, BLOCK_SIZE, 1)
        self.cache = torch.full(size, _POISONED)
        self.scores = None
        if num_score_pages:
            size = (num_layers, num_score_pages, num_heads, BLOCK_SIZE)
            self.scores = torch.full(size, _POISONED)

    def poison(self, block_ids: Sequence[int]) -> None:
        self.cache[:, list(block_ids)] = _POISONED

    def write(self, table: Sequence[int], start: int, numbers: np.ndarray) -> None:
        """Common entries from a position on, each head in its own slot.

        Args:
            table: Block of every column.
            numbers: [num_layers, num_heads, num_entries].
        """
        _write_common(self.cache.numpy()[..., 0], table, start, numbers)

    def score(self, pages: Sequence[int], start: int, numbers: np.ndarray) -> None:
        """Scores of entries from a position on; args as of `write`."""
        assert self.scores is not None
        _write_common(self.scores.numpy(), pages, start, numbers)

    def read(self, layer: int, table: np.ndarray, num_entries: int) -> np.ndarray:
        """[num_entries]: what the pages of a row hold."""
        return _read(self.cache.numpy()[layer].reshape(-1, BLOCK_SIZE), table, num_entries)


@dataclass(frozen=True)
class ExpectedCompaction:
    """What a compaction must find and leave.

    Attributes:
        order: The scheduler's.
        held: [num_layers, num_heads]: pages that heads own before; 0 before the first one.
        kept: [num_layers, num_heads]: pages that they own afterwards.
        entries: By layer and head, the numbers of all live entries.
        scores: By layer and head, the numbers of the scores of the leading ones.
        left: By layer and head, the numbers of the kept entries, and of their scores.
    """

    order: Any
    held: np.ndarray
    kept: np.ndarray
    entries: list[list[np.ndarray]]
    scores: list[list[np.ndarray]]
    left: list[list[np.ndarray]]


class SymbolicPolicy:
    """Checks the rows that it is to compress, and writes what a later step has to find.

    Args:
        symbols: Of the group.
        num_heads: kv_heads of a layer.

    Attributes:
        num_rows: Rows that were compressed.
    """

    selector = SimpleNamespace(num_sink_tokens=1)
    coverage = None

    def __init__(self, symbols: Symbols, num_heads: int) -> None:
        self.num_rows = 0
        self._symbols = symbols
        self._num_heads = num_heads
        # By the first block that is written to, which is in no other request's table.
        self._by_target: dict[int, ExpectedCompaction] = {}

    def expect(self, compactions: Sequence[ExpectedCompaction]) -> None:
        """What is to be compressed next."""
        self._by_target = {}
        for compaction in compactions:
            order = compaction.order
            for block_id in order.block_ids[order.first - order.first_before :]:
                self._by_target[block_id] = compaction

    def max_entries(self, workspace_bytes: int, num_heads: int, *, protects: bool = False) -> int:
        return _WAVE_ENTRIES * self._num_heads // num_heads

    def compact(self, context: Any) -> None:
        # A group's rotations are the numbers of its layers.
        (layer,) = context.rotations
        cache = context.key_cache.numpy()[0, :, 0, :, 0]
        scores = (
            None
            if context.accumulated_pages is None
            else context.accumulated_pages.numpy()[0, :, 0]
        )
        table, columns = context.block_table.numpy(), context.target_columns.tolist()
        lens = [context.num_live, context.num_entries, context.num_scored, context.budgets]
        assert context.rows_together == self._num_heads
        written = []
        for row, (live, entries, scored, budget) in enumerate(
            zip(*(length.tolist() for length in lens), strict=True)
        ):
            target = table[row, columns[row] : columns[row] + budget // BLOCK_SIZE]
            at, head = self._by_target[target[0] // self._num_heads], row % self._num_heads
            where = f"compaction of {at.order.req_id}, layer {layer}, kv_head {head}"
            found = _read(cache, table[row], live)
            self._symbols.check(found, at.entries[layer][head], where)
            held_columns = at.held[layer].sum() // self._num_heads
            more = int(at.held[layer, head] - held_columns) * BLOCK_SIZE
            num_entries = (at.order.tail - at.order.first_before) * BLOCK_SIZE + more
            assert entries == num_entries, where
            assert budget == at.kept[layer, head] * BLOCK_SIZE, where
            if scores is not None:
                found = _read(scores, context.score_table.numpy()[row], scored)
                self._symbols.check(found, at.scores[layer][head], f"scores, {where}")
            written.append((target, at.left[layer][head].reshape(-1, BLOCK_SIZE)))
        for target, left in written:
            cache[target] = left
            if scores is not None:
                scores[target] = left
        self.num_rows += context.num_rows


def _write_common(pages: np.ndarray, table: Sequence[int], start: int, numbers: np.ndarray) -> None:
    columns, offsets = np.divmod(np.arange(start, start + numbers.shape[-1]), BLOCK_SIZE)
    # What is indexed comes first.
    pages[:, np.asarray(table)[columns], :, offsets] = numbers.transpose(2, 0, 1)


def _read(pages: np.ndarray, table: np.ndarray, num_entries: int) -> np.ndarray:
    return pages[table[: -(-num_entries // BLOCK_SIZE)]].reshape(-1)[:num_entries]
