# SPDX-License-Identifier: Apache-2.0
"""The rows of a compaction as numbers on the host: requests, or their kv_heads one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ems_vllm.engine.group.prompt_chunks import score_pages

if TYPE_CHECKING:
    from ems_vllm.engine.orders import Compaction


@dataclass(frozen=True)
class CompactionRows:
    """What a CompactionContext says of its rows, under the same names.

    Attributes:
        block_table, score_table: [num_rows, num_columns], int32, padded with 0.
        rows_together: Consecutive rows that share blocks.
        Others: [num_rows], int32; bool for `is_untouched`.
    """

    block_table: np.ndarray
    score_table: np.ndarray
    num_entries: np.ndarray
    num_live: np.ndarray
    num_scored: np.ndarray
    budgets: np.ndarray
    num_protected: np.ndarray
    target_columns: np.ndarray
    num_represented: np.ndarray
    ring_rows: np.ndarray
    num_queries: np.ndarray
    end_positions: np.ndarray
    is_untouched: np.ndarray
    rows_together: int = 1

    @property
    def num_rows(self) -> int:
        return len(self.num_entries)


def rows_of(orders: Sequence[Compaction], block_size: int, num_sinks: int) -> CompactionRows:
    """A row for each order.

    Args:
        block_size: Tokens per block.
        num_sinks: First entries that always stay.
    """

    def ints(values: Sequence[int]) -> np.ndarray:
        return np.asarray(values, np.int32)

    budgets = ints([order.tail - order.first for order in orders]) * block_size
    live_from = ints([order.first_before for order in orders]) * block_size
    return CompactionRows(
        block_table=_padded([order.block_ids for order in orders]),
        score_table=_padded([_live_score_pages(order) for order in orders]),
        num_entries=ints([order.tail for order in orders]) * block_size - live_from,
        num_live=ints([order.num_computed for order in orders]) - live_from,
        num_scored=ints([order.num_scored for order in orders]),
        budgets=budgets,
        num_protected=np.minimum(budgets, num_sinks).astype(np.int32),
        target_columns=ints([order.first - order.first_before for order in orders]),
        num_represented=ints([order.num_represented for order in orders]),
        ring_rows=ints([order.ring_row for order in orders]),
        num_queries=ints([order.num_queries for order in orders]),
        end_positions=ints([order.num_computed for order in orders]),
        is_untouched=live_from == 0,
    )


def by_head(rows: CompactionRows, held: np.ndarray, block_size: int) -> CompactionRows:
    """A row for each kv_head of each request, in one layer, over pages of one kv_head.

    Page block * num_heads + slot is that slot of a block. Of the leading columns that `held`
    counts the heads own consecutive pages (see ops.head_pages); of all others each has its own
    slot. Where the rows are written to is for `dealt` to say; until then all keep as much.

    Args:
        rows: Of requests.
        held: [num_rows, num_heads], int - pages that each head owns in the leading columns, which
            are as many for all heads together; all 0 for a request that was not compressed before.
        block_size: Tokens per block.
    """
    num_rows, num_heads = held.shape
    held_columns = held.sum(1) // num_heads
    num_columns = -(-rows.num_live // block_size)
    num_scored_columns = rows.num_entries // block_size
    width = int((held - held_columns[:, None] + num_columns[:, None]).max())
    block_table = np.zeros((num_rows, num_heads, width), np.int32)
    score_table = np.zeros((num_rows, num_heads, width), np.int32)
    for row in range(num_rows):
        starts = _starts(held[row])
        blocks = rows.block_table[row, : num_columns[row]]
        scores = rows.score_table[row, : num_scored_columns[row]]
        for head in range(num_heads):
            for table, columns in ((block_table, blocks), (score_table, scores)):
                common = columns[held_columns[row] :] * num_heads + head
                pages = np.concatenate([_own_pages(columns, starts, head), common])
                table[row, head, : len(pages)] = pages

    def of_heads(per_row: np.ndarray) -> np.ndarray:
        return np.repeat(per_row, num_heads)

    # What the heads hold more or less than the columns have room for.
    more = ((held - held_columns[:, None]) * block_size).astype(np.int32).reshape(-1)
    num_scored = of_heads(rows.num_scored)
    return replace(
        rows,
        block_table=block_table.reshape(num_rows * num_heads, -1),
        score_table=score_table.reshape(num_rows * num_heads, -1),
        num_entries=of_heads(rows.num_entries) + more,
        num_live=of_heads(rows.num_live) + more,
        # The entries of a request that was compressed have a score each, or none has.
        num_scored=np.where(num_scored > 0, num_scored + more, 0).astype(np.int32),
        budgets=of_heads(rows.budgets),
        num_protected=of_heads(rows.num_protected),
        # Behind the columns that any row reads.
        target_columns=np.full(num_rows * num_heads, width, np.int32),
        num_represented=of_heads(rows.num_represented),
        ring_rows=np.arange(num_rows * num_heads, dtype=np.int32),
        num_queries=of_heads(rows.num_queries),
        end_positions=of_heads(rows.end_positions),
        is_untouched=of_heads(rows.is_untouched),
        rows_together=num_heads,
    )


def dealt(
    heads: CompactionRows, rows: CompactionRows, kept: np.ndarray, block_size: int
) -> CompactionRows:
    """Rows of `by_head` that keep what they are dealt, with the columns that it is written to.

    Args:
        heads: Of by_head.
        rows: Of requests.
        kept: [num_rows, num_heads], int - pages that each head will own in the columns that are
            written to, which are as many for all heads together.
        block_size: Tokens per block.
    """
    targets = np.zeros((*kept.shape, int(kept.max())), np.int32)
    for row, of_row in enumerate(kept):
        starts, columns = _starts(of_row), rows.block_table[row, rows.target_columns[row] :]
        for head, count in enumerate(of_row):
            targets[row, head, :count] = _own_pages(columns, starts, head)
    budgets = (kept * block_size).astype(np.int32).reshape(-1)
    return replace(
        heads,
        block_table=np.hstack([heads.block_table, targets.reshape(heads.num_rows, -1)]),
        budgets=budgets,
        num_protected=np.minimum(heads.num_protected, budgets),
    )


def _starts(pages: np.ndarray) -> np.ndarray:
    """[num_heads + 1]: first page of each head, and behind the last one the number of all."""
    return np.concatenate([[0], np.cumsum(pages)])


def _own_pages(columns: np.ndarray, starts: np.ndarray, head: int) -> np.ndarray:
    """Pages that a head owns in the leading columns of a request."""
    num_heads = len(starts) - 1
    own = np.arange(starts[head], starts[head + 1])
    pages: np.ndarray = columns[own // num_heads] * num_heads + own % num_heads
    return pages


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _live_score_pages(order: Compaction) -> list[int]:
    """Score page of every column that is compressed."""
    num_columns = order.tail - order.first_before
    return score_pages(order.score_pages, order.block_ids)[:num_columns]
