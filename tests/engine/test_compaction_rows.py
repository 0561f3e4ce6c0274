# SPDX-License-Identifier: Apache-2.0
"""kv_heads as rows: every page is read once and written once, by the head that owns it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.engine.group.compaction_rows import CompactionRows, by_head, dealt, rows_of
from ems_vllm.engine.orders import Compaction

BLOCK_SIZE = 4


def deal(draw, num_heads: int, columns: int) -> list[int]:
    """Pages of each head, all of `columns` columns together, at least one each."""
    pages = [1] * num_heads
    for _ in range(columns * num_heads - num_heads):
        pages[draw(st.integers(0, num_heads - 1))] += 1
    return pages


@dataclass(frozen=True)
class Case:
    """A request that is compressed.

    Attributes:
        held_columns, kept_columns: Columns in which heads own pages, before and after.
        new_columns: Common ones behind them that are compressed too.
        num_live: Tokens behind those.
    """

    held: list[int]
    kept: list[int]
    held_columns: int
    kept_columns: int
    new_columns: int
    num_live: int
    num_private: int

    @property
    def num_columns(self) -> int:
        return self.held_columns + self.new_columns

    def order(self, index: int) -> Compaction:
        first_before = 7 if self.held_columns else 0
        tail = first_before + self.num_columns
        num_computed = tail * BLOCK_SIZE + self.num_live
        count = -(-num_computed // BLOCK_SIZE) - first_before
        return Compaction(
            req_id=str(index),
            group_id=0,
            first_before=first_before,
            first=tail - self.kept_columns,
            tail=tail,
            num_computed=num_computed,
            block_ids=[100 * (index + 1) + 3 * column for column in range(count)],
            score_pages=[5000 + 100 * index + column for column in range(self.num_private)],
            num_scored=0 if index % 2 else self.num_columns * BLOCK_SIZE - 1,
            num_represented=3,
            ring_row=index,
            num_queries=2,
            prompt_blocks=0,
        )


@st.composite
def cases(draw) -> list[Case]:
    num_heads = draw(st.integers(1, 4))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        held_columns = draw(st.integers(0, 5))
        new_columns = draw(st.integers(1, 6))
        kept_columns = draw(st.integers(1, held_columns + new_columns))
        found.append(
            Case(
                held=deal(draw, num_heads, held_columns) if held_columns else [0] * num_heads,
                kept=deal(draw, num_heads, kept_columns),
                held_columns=held_columns,
                kept_columns=kept_columns,
                new_columns=new_columns,
                num_live=draw(st.integers(0, 9)),
                num_private=0 if held_columns else draw(st.integers(0, new_columns)),
            )
        )
    return found


def split(found: list[Case]) -> tuple[CompactionRows, CompactionRows, list[Compaction]]:
    orders = [case.order(index) for index, case in enumerate(found)]
    requests = rows_of(orders, BLOCK_SIZE, num_sinks=3)
    held, kept = (np.array([getattr(case, name) for case in found]) for name in ("held", "kept"))
    rows = by_head(requests, held, BLOCK_SIZE)
    return requests, dealt(rows, requests, kept, BLOCK_SIZE), orders


def pages_read(rows: CompactionRows, row: int) -> list[int]:
    return rows.block_table[row, : -(-rows.num_live[row] // BLOCK_SIZE)].tolist()


def pages_written(rows: CompactionRows, row: int) -> list[int]:
    start = rows.target_columns[row]
    return rows.block_table[row, start : start + rows.budgets[row] // BLOCK_SIZE].tolist()


@given(cases())
def test_every_page_is_read_once_and_written_once(found):
    _, rows, orders = split(found)
    num_heads = rows.rows_together
    for at, (case, order) in enumerate(zip(found, orders, strict=True)):
        of_request = range(at * num_heads, (at + 1) * num_heads)
        read = [page for row in of_request for page in pages_read(rows, row)]
        written = [page for row in of_request for page in pages_written(rows, row)]
        pages = {
            block: range(block * num_heads, (block + 1) * num_heads) for block in order.block_ids
        }
        assert sorted(read) == sorted(page for block in order.block_ids for page in pages[block])
        target = order.first - order.first_before
        kept_blocks = order.block_ids[target : target + case.kept_columns]
        assert sorted(written) == sorted(page for block in kept_blocks for page in pages[block])


@given(cases())
def test_a_head_reads_its_own_pages_and_then_its_slot_of_common_blocks(found):
    _, rows, orders = split(found)
    num_heads = rows.rows_together
    for at, (case, order) in enumerate(zip(found, orders, strict=True)):
        for head in range(num_heads):
            row, own = at * num_heads + head, case.held[head]
            common = pages_read(rows, row)[own:]
            blocks = order.block_ids[case.held_columns :]
            assert common == [block * num_heads + head for block in blocks]
            assert rows.num_entries[row] == (own + case.new_columns) * BLOCK_SIZE
            assert rows.num_live[row] == rows.num_entries[row] + case.num_live
            assert len(pages_written(rows, row)) == case.kept[head]


@given(cases())
def test_what_is_written_was_laid_out_to_be_read(found):
    """A second compaction finds what the first one wrote, head by head."""
    _, rows, orders = split(found)
    num_heads = rows.rows_together
    later = []
    for case, order in zip(found, orders, strict=True):
        later.append(
            order._replace(
                first_before=order.first,
                first=order.tail,
                tail=order.tail + case.kept_columns,
                num_computed=(order.tail + case.kept_columns) * BLOCK_SIZE,
                block_ids=[
                    *order.block_ids[
                        order.first - order.first_before : order.tail - order.first_before
                    ],
                    *range(9000, 9000 + case.kept_columns),
                ],
                score_pages=[],
                num_scored=case.kept_columns * BLOCK_SIZE,
            )
        )
    kept = np.array([case.kept for case in found])
    again = by_head(rows_of(later, BLOCK_SIZE, 3), kept, BLOCK_SIZE)
    for row in range(rows.num_rows):
        own = found[row // num_heads].kept[row % num_heads]
        assert pages_read(again, row)[:own] == pages_written(rows, row)
        # All of them have a score each.
        assert again.num_scored[row] == own * BLOCK_SIZE


@given(cases())
def test_scores_lie_in_the_pages_of_their_columns(found):
    requests, rows, orders = split(found)
    num_heads = rows.rows_together
    for at, (case, order) in enumerate(zip(found, orders, strict=True)):
        private = order.score_pages
        expected = [*private, *order.block_ids[len(private) : case.num_columns]]
        assert requests.score_table[at, : case.num_columns].tolist() == expected
        for head in range(num_heads):
            row = at * num_heads + head
            scored = rows.score_table[row, : rows.num_entries[row] // BLOCK_SIZE].tolist()
            common = expected[case.held_columns :]
            assert scored[case.held[head] :] == [page * num_heads + head for page in common]
            # What was kept has its scores where its keys are.
            assert scored[: case.held[head]] == pages_read(rows, row)[: case.held[head]]


def test_what_heads_share_and_what_they_do_not():
    case = Case([1, 3], [3, 1], 2, 2, 4, num_live=5, num_private=0)
    requests, rows, _ = split([case])
    assert rows.num_rows == 2
    assert rows.budgets.tolist() == [12, 4]
    assert rows.num_protected.tolist() == [3, 3]
    assert rows.ring_rows.tolist() == [0, 1]
    for name in ("num_represented", "num_queries", "end_positions", "is_untouched"):
        assert getattr(rows, name).tolist() == getattr(requests, name).tolist() * 2
    # Behind what the longer one reads: 3 pages, 4 blocks, and the 5 tokens behind them.
    assert rows.target_columns.tolist() == [9, 9]
