# SPDX-License-Identifier: Apache-2.0
"""shift_block_tables against its reference, into persistent buffers wider than the batch."""

import pytest
import torch
from compare import assert_bitwise
from generators import int_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops


def make_args(first_columns: list[int], num_columns: int = 10) -> tuple:
    """Tables that are views of wider buffers, as in the engine."""
    num_rows = len(first_columns)
    block_table = torch.randint(1, 1000, (num_rows, num_columns + 5), dtype=torch.int32)
    seq_lens = torch.randint(0, 16 * num_columns + 1, (num_rows,), dtype=torch.int32)
    out_block_table = torch.full((num_rows, num_columns + 7), -7, dtype=torch.int32)
    return (
        block_table[:, :num_columns],
        seq_lens,
        int_tensor(first_columns),
        16,
        out_block_table[:, :num_columns],
        torch.full((num_rows,), -7, dtype=torch.int32),
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=0, max_size=6), st.integers(1, 12))
def test_matches_reference(first_columns, num_columns):
    args = make_args(first_columns, num_columns)
    expected = args[4].clone(), args[5].clone()
    ops.shift_block_tables(*args)
    ops.shift_block_tables.reference(*args[:4], *expected)
    assert_bitwise(args[4], expected[0])
    assert_bitwise(args[5], expected[1])
    beyond = args[4].as_strided((len(first_columns), 7), (num_columns + 7, 1), num_columns)
    assert (beyond == -7).all()


@pytest.mark.cpu_only
def test_opcheck():
    torch.library.opcheck(torch.ops.ems_vllm.shift_block_tables.default, make_args([0, 3, 10]))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, 0, "shift_block_tables: block_size must be at least 1, got 0"),
        (1, torch.zeros(2), "seq_lens must have dtype Int, got Float"),
        (2, int_tensor([0, -1]), r"first_columns\[1\] must be in 0\.\.\d+, got -1"),
        (4, torch.zeros(2, 9, dtype=torch.int32), r"out_block_table must have shape \[2, 10\]"),
        (0, torch.zeros(10, dtype=torch.int32), r"block_table must have shape \[10, \*\]"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, value, message):
    args = list(make_args([0, 3]))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        ops.shift_block_tables(*args)
