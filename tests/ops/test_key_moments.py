# SPDX-License-Identifier: Apache-2.0
"""key_moments against its reference, on poisoned caches."""

import pytest
import torch
from compare import assert_bitwise
from generators import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.keys import LENS, ROTATIONS, Case, make_case

from ems_vllm import ops


def check(case: Case) -> None:
    expected = [torch.full_like(out, torch.nan) for out in case.moments]
    ops.key_moments.reference(*case.keys, *expected)
    ops.key_moments(*case.keys, *case.moments)
    num_entries = case.keys[2][:, None, None]
    deviations = expected[2].diagonal(dim1=-2, dim2=-1).sqrt()
    # Sums of so many unit vectors, means of keys of about 1, and products in units of deviations:
    # tensor cores leave out 2^-17 of keys around another one, which lies up to 4 deviations away.
    bounds = (
        1e-6 * num_entries,
        1e-5 * (1 + expected[1].abs()),
        1e-4 * deviations[..., None] * deviations[..., None, :] + 1e-6,
    )
    for actual, wanted, bound in zip(case.moments, expected, bounds, strict=True):
        assert ((actual - wanted).abs() <= bound).all()
    products = case.moments[2]
    assert_bitwise(products, products.mT)
    alone = torch.full_like(case.moments[0], torch.nan)
    ops.key_moments(*case.keys, alone)
    assert_bitwise(alone, case.moments[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout(dtype, layout):
    check(make_case(dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [64, 96])
def test_float8_cache(head_size, layout):
    check(make_case(dtype=torch.float16, layout=layout, head_size=head_size, to_float8=True))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_size(head_size):
    check(make_case([70, 9], num_layers=1, head_size=head_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotation(rotation):
    check(make_case([70, 9], **ROTATIONS[rotation]))


@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("length", [1, 15, 17, 64, 65, 700])
def test_lengths(length, block_size):
    check(make_case([length], block_size=block_size, num_layers=1, num_kv_heads=1))


def test_parts_of_a_long_row():
    """More keys than one CTA has."""
    case = make_case([8300, 3], num_layers=1, num_kv_heads=1)
    check(case)
    # As without the longer row.
    alone = Case((*case.keys[:1], *(t[1:] for t in case.keys[1:3]), *case.keys[3:]), (), 0)
    moments = [torch.full_like(out[:, 1:], torch.nan) for out in case.moments]
    ops.key_moments(*alone.keys, *moments)
    for of_both, of_one in zip(case.moments, moments, strict=True):
        assert_bitwise(of_both[:, 1:], of_one)


def test_products_survive_a_large_mean():
    """Of about 300 times the deviations, whose squares float32 would lose."""
    case = make_case([500], rotary_dim=0)
    case.keys[0].add_(300.0)
    check(case)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=3), st.booleans())
def test_any_batch(lens, is_neox):
    check(make_case(lens, block_size=8, is_neox=is_neox, num_layers=1))


def test_zero_vectors_have_no_direction():
    case = make_case([20], dtype=torch.bfloat16)
    case.keys[0][:, case.keys[1][0, 0]] = 0
    check(case)


def test_no_rows():
    case = make_case([5])
    key, table, lens, *rotation = case.keys
    ops.key_moments(key, table[:0], lens[:0], *rotation, *(out[:, :0] for out in case.moments))


@pytest.mark.cpu_only
def test_opcheck():
    case = make_case([30])
    args = (case.keys[0].nan_to_num(), *case.keys[1:], *map(torch.nan_to_num, case.moments))
    torch.library.opcheck(torch.ops.ems_vllm.key_moments.default, args)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "key_moments: key_cache must have dtype float32, bfloat16, "),
        (1, lambda t: t + 100, r"block_table\[0, 0\] must be in 0\.\.\d+, got 1\d\d"),
        (2, lambda t: t + 999, r"num_entries\[0\] must be in 0\.\.160, got 1128"),
        (3, torch.Tensor.double, "cos_sin must have dtype float32, bfloat16 or float16, got Doub"),
        (3, lambda t: t[:, :3], "cos_sin must have an even number of columns, at most head_size "),
        (3, lambda t: t.repeat(1, 2), r"head_size \(64\), got 128"),
        (5, lambda t: t[..., 1:], r"directions must have shape \[2, 5, 2, 64\], got"),
        (6, lambda t: None, "means and products must be given together"),
        (7, lambda t: t[:, :, :, 1:], r"products must have shape \[2, 5, 2, 64, 64\]"),
        (7, lambda t: t.new_empty(2, 5, 2, 64, 65)[..., 1:], "contiguous in its last two dimens"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, change, message):
    case = make_case(LENS)
    args = [*case.keys, *case.moments]
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.key_moments(*args)
