# SPDX-License-Identifier: Apache-2.0
"""head_pages against its reference, into buffers wider than what is written to them."""

import pytest
import torch
from compare import assert_bitwise
from generators import NO_BLOCK, int_tensor, scattered_table
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops

BLOCK_SIZE = 4
MARGIN = 7


def random_starts(num_dealt: int, num_heads: int) -> torch.Tensor:
    """[num_heads + 1]: every way to cut the pages of so many columns, empty shares included."""
    num_pages = num_dealt * num_heads
    cuts = torch.randint(0, num_pages + 1, (num_heads - 1,)).sort().values
    return int_tensor([0, *cuts.tolist(), num_pages])


def equal_starts(num_dealt: int, num_heads: int) -> torch.Tensor:
    return torch.arange(num_heads + 1, dtype=torch.int32) * num_dealt


def make_args(
    rows: list[tuple[int, int]], num_heads: int, deal=random_starts, layers_first: bool = False
) -> tuple:
    """Arguments for rows of (dealt columns, entries more than those hold).

    All matrices are views of wider ones. What must not be read leads far away, and the columns of
    the result are as few as the rows need.
    """
    seq_lens = [num_dealt * BLOCK_SIZE + more for num_dealt, more in rows]
    num_columns = [
        max(num_dealt, -(-seq_len // BLOCK_SIZE)) if seq_len > 0 else 0
        for (num_dealt, _), seq_len in zip(rows, seq_lens, strict=True)
    ]
    width = max([*num_columns, 1])
    block_table = scattered_table(num_columns, width + MARGIN, sum(num_columns) + 2)[:, :width]
    num_places = len(rows) + 2
    size = (3, num_places) if layers_first else (num_places, 3)
    all_starts = torch.full((*size, num_heads + 1), NO_BLOCK, dtype=torch.int32)
    page_starts = all_starts[1] if layers_first else all_starts[:, 1]
    places = torch.randperm(num_places, dtype=torch.int32)[: len(rows)]
    most = 1
    for row, (num_dealt, _) in enumerate(rows):
        if seq_lens[row] <= 0:
            places[row] = NO_BLOCK
            continue
        starts = deal(num_dealt, num_heads)
        page_starts[int(places[row])] = starts
        most = max(most, int(starts.diff().max()) + num_columns[row] - num_dealt)
    out_block_table = torch.full((len(rows) * num_heads, most + MARGIN), -7, dtype=torch.int32)
    return (
        *(block_table, int_tensor(seq_lens), places, page_starts, BLOCK_SIZE),
        *(out_block_table[:, :most], torch.full((len(rows) * num_heads,), -7, dtype=torch.int32)),
    )


def whole(out_block_table: torch.Tensor) -> torch.Tensor:
    """What the result is the left part of."""
    return out_block_table.as_strided(
        (len(out_block_table), out_block_table.shape[1] + MARGIN), out_block_table.stride()
    )


def check(args: tuple) -> None:
    tables = whole(args[5]), whole(args[5]).clone()
    expected_lens = args[6].clone()
    ops.head_pages(*args)
    ops.head_pages.reference(*args[:5], tables[1][:, : args[5].shape[1]], expected_lens)
    assert_bitwise(*tables)
    assert_bitwise(args[6], expected_lens)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(-9, 13)), min_size=0, max_size=5),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_matches_reference(rows, num_heads, layers_first, seed):
    torch.manual_seed(seed)
    check(make_args(rows, num_heads, layers_first=layers_first))


def test_more_columns_than_threads():
    check(make_args([(150, 601), (0, 600), (150, -3)], 3))


def test_by_hand():
    """Three columns of two kv_heads, dealt 4 to 2, two entries in the fourth; a row that pads."""
    out_block_table = torch.full((4, 6), -7, dtype=torch.int32)
    out_seq_lens = torch.full((4,), -7, dtype=torch.int32)
    ops.head_pages(
        int_tensor([[10, 20, 30, 40], [50, 60, 70, 80]]),
        int_tensor([14, 0]),
        int_tensor([1, 1]),
        int_tensor([[0, 0, 0], [0, 4, 6]]),
        4,
        out_block_table,
        out_seq_lens,
    )
    assert out_block_table.tolist() == [
        [20, 21, 40, 41, 80, -7],
        [60, 61, 81, -7, -7, -7],
        [-7] * 6,
        [-7] * 6,
    ]
    assert out_seq_lens.tolist() == [18, 10, 0, 0]


@pytest.mark.parametrize("num_heads", range(1, 9))
def test_without_dealt_columns_every_head_has_its_slot(num_heads):
    args = make_args([(0, 9), (0, 1), (0, 24)], num_heads)
    ops.head_pages(*args)
    lens = args[1].repeat_interleave(num_heads)
    assert_bitwise(args[6], lens)
    heads = torch.arange(num_heads, dtype=torch.int32).repeat(3)[:, None]
    pages = args[0].repeat_interleave(num_heads, 0) * num_heads + heads
    is_live = torch.arange(pages.shape[1]) * BLOCK_SIZE < lens[:, None]
    assert_bitwise(args[5], pages.where(is_live, torch.tensor(-7, dtype=torch.int32)))


@pytest.mark.parametrize("num_heads", range(1, 9))
def test_equal_shares_are_as_long_as_before_and_hold_every_page_once(num_heads):
    args = make_args([(3, 6), (5, 0), (1, 1)], num_heads, equal_starts)
    ops.head_pages(*args)
    assert_bitwise(args[6], args[1].repeat_interleave(num_heads))
    for row, blocks in enumerate(args[0]):
        pages = args[5][row * num_heads : (row + 1) * num_heads].flatten()
        blocks = blocks[blocks != NO_BLOCK][:, None]
        expected = blocks * num_heads + torch.arange(num_heads, dtype=torch.int32)
        assert_bitwise(pages[pages >= 0].sort().values, expected.flatten().sort().values)


def test_padding_needs_no_place():
    args = list(make_args([(0, 0), (0, -1)], 2))
    args[3] = torch.zeros(0, 3, dtype=torch.int32)
    check(tuple(args))
    assert not args[6].any()


OUT_OF_RANGE = {
    "place behind the last": (2, int_tensor([2, 0]), r"places\[0\] must be in 0\.\.1, got 2"),
    "negative place": (2, int_tensor([0, -1]), r"places\[1\] must be in 0\.\.1, got -1"),
    "first page": (3, int_tensor([[1, 4, 6], [0, 2, 4]]), r"page_starts\[0, 0\] must be in 0\.\.0"),
    "negative pages": (3, int_tensor([[-9, -7, -6]] * 2), r"page_starts\[0, 0\] must be in 0\.\.0"),
    "descending": (3, int_tensor([[0, 4, 6], [0, 6, 4]]), r"page_starts\[1, 2\] must be in 6\.\.8"),
    "half a column": (3, int_tensor([[0, 4, 5]] * 2), r"page_starts\[0, 2\] must be a multiple of"),
    "pages": (3, int_tensor([[0, 4, 10]] * 2), r"page_starts\[0, 2\] must be in 4\.\.8, got 10"),
    "many pages": (3, int_tensor([[0, 2**30, 2**31 - 1]] * 2), r"page_starts\[0, 1\] must be in 0"),
    "entries": (1, int_tensor([14, 17]), r"seq_lens\[1\] must be in 0\.\.16, got 17"),
    "many entries": (1, int_tensor([2**31 - 1, 9]), r"seq_lens\[0\] must be in 0\.\.16, got"),
    "result": (3, int_tensor([[0, 6, 6]] * 2), r"out_seq_lens\[0\] must be in 0\.\.20, got 26"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_what_is_out_of_range(case, implementation):
    """Refused on the CPU; a GPU writes none but pages of the table, none beyond the result."""
    blocks = torch.full((4, 4 + MARGIN), NO_BLOCK - 1, dtype=torch.int32)
    blocks[1:3, :4] = torch.arange(8, dtype=torch.int32).view(2, 4)
    lens = torch.full((6,), -7, dtype=torch.int32)
    buffer = torch.full((6, 5 + MARGIN), -7, dtype=torch.int32)
    all_starts = int_tensor([[0, 2, 4], [0, 4, 6], [0, 2, 4], [0, 2, 4]])
    args = [
        *(blocks[1:3, :4], int_tensor([14, 9]), int_tensor([0, 1])),
        *(all_starts[1:3], 4, buffer[1:5, :5], lens[1:5]),
    ]
    index, value, message = OUT_OF_RANGE[case]
    args[index] = value
    if implementation == "cpu":
        with pytest.raises(RuntimeError, match=f"head_pages: {message}"):
            ops.head_pages(*args)
        assert (buffer == -7).all()
        assert (lens == -7).all()
        return
    ops.head_pages(*args)
    written = torch.zeros_like(buffer, dtype=torch.bool)
    written[1:5, :5] = True
    assert (buffer[~written] == -7).all()
    assert set(buffer.unique().tolist()) <= {-7, *range(16)}
    assert lens[[0, 5]].tolist() == [-7, -7]
    assert ((lens[1:5] >= 0) & (lens[1:5] <= 5 * 4)).all()
    has_place = (args[2] >= 0) & (args[2] < 2)
    assert ((lens[1:5] > 0) <= has_place.repeat_interleave(2)).all()


@pytest.mark.cpu_only
def test_opcheck():
    args = make_args([(3, 5), (0, 0), (0, 7)], 2)
    torch.library.opcheck(torch.ops.ems_vllm.head_pages.default, args)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (4, 0, "head_pages: block_size must be at least 1, got 0"),
        (1, torch.zeros(2), "seq_lens must have dtype Int, got Float"),
        (2, int_tensor([0]), r"places must have shape \[2\], got \[1\]"),
        (3, int_tensor([0, 0]), r"page_starts must have shape \[\*, \*\], got \[2\]"),
        (3, int_tensor([[0]]), "page_starts must have at least 2 columns, one more than kv_heads"),
        (3, int_tensor([[0, 0, 0, 0]]), r"out_block_table must have shape \[6, \*\], got \[4, "),
        (3, torch.zeros(3, 2, dtype=torch.int32).T, "page_starts must be contiguous in its last"),
        (6, int_tensor([0, 0]), r"out_seq_lens must have shape \[4\], got \[2\]"),
        (0, torch.zeros(10, dtype=torch.int32), r"block_table must have shape \[10, \*\]"),
        (0, int_tensor([[0], [-1]]), r"block_table\[1, 0\] must be in 0\.\.1073741823, got -1"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, value, message):
    args = list(make_args([(0, 1), (0, 3)], 2))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        ops.head_pages(*args)
