# SPDX-License-Identifier: Apache-2.0
"""vector_norms against its reference, on poisoned caches."""

import pytest
import torch
from compare import assert_close
from generators import LAYOUTS, int_tensor, paged_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops

LENS = [129, 63, 1, 0, 16]


def make_args(lens=LENS, *, to_float8=False, of_values=False, **shape) -> tuple:
    cache = paged_cache(lens, num_layers=2, **shape)
    if to_float8:
        cache = cache.to_float8()
    vectors = cache.value if of_values else cache.key
    # A slice of a wider workspace.
    norms = torch.full((2, len(lens), vectors.shape[2], max(lens) + 9), float("nan"))
    return vectors, cache.block_table, int_tensor(lens), norms[..., : max(lens) + 4]


def check(args: tuple) -> None:
    expected = torch.full_like(args[-1], float("nan"))
    ops.vector_norms.reference(*args[:-1], expected)
    ops.vector_norms(*args)
    assert_close(args[-1], expected, "norms")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout(dtype, layout):
    check(make_args(dtype=dtype, layout=layout))
    check(make_args(dtype=dtype, layout=layout, of_values=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_float8_cache(head_size, layout):
    check(make_args(dtype=torch.float16, layout=layout, head_size=head_size, to_float8=True))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_size(head_size):
    check(make_args(head_size=head_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 31, 33, 256, 257, 1000])
def test_lengths(length, block_size):
    check(make_args([length], block_size=block_size))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_any_batch(lens):
    check(make_args(lens, block_size=8))


def test_no_rows_and_no_entries():
    key, table, lens, norms = make_args([5])
    ops.vector_norms(key, table[:0], lens[:0], norms[:, :0])
    ops.vector_norms(key, table, lens - 5, norms[..., :0])


@pytest.mark.cpu_only
def test_opcheck():
    args = make_args([30])
    args = (args[0].nan_to_num(), *args[1:3], torch.zeros_like(args[3]))
    torch.library.opcheck(torch.ops.ems_vllm.vector_norms.default, args)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "vector_norms: cache must have dtype float32, bfloat16, "),
        (1, lambda t: t + 100, r"block_table\[0, 0\] must be in 0\.\.3, got 1\d\d"),
        (2, lambda t: t + 5, r"num_entries\[0\] must be in 0\.\.34, got 35"),
        (3, lambda t: t[:1], r"norms must have shape \[2, 1, 2, \*\]"),
        (3, torch.Tensor.double, "norms must have dtype Float, got Double"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, change, message):
    args = list(make_args([30]))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.vector_norms(*args)
