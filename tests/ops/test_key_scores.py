# SPDX-License-Identifier: Apache-2.0
"""key_scores against its reference, on poisoned caches."""

import pytest
import torch
from compare import assert_bitwise, assert_close
from generators import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.keys import LENS, ROTATIONS, Case, make_case

from ems_vllm import ops


def whitening_of(products: torch.Tensor) -> torch.Tensor:
    """As policies make it; what lies above the diagonal is poisoned."""
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(0.01 * diagonal.mean(-1, keepdim=True) + 1e-20)
    size = products.shape[-1]
    inverse = torch.linalg.inv(torch.linalg.cholesky(products.double())).float()
    return inverse.masked_fill(torch.ones(size, size).triu(1).bool(), torch.nan)


def moments_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """directions, means and whitening."""
    ops.key_moments.reference(*case.keys, *case.moments)
    directions, means, products = case.moments
    return directions, means, whitening_of(products)


def poisoned(case: Case) -> torch.Tensor:
    """A slice of a wider workspace."""
    return torch.full((*case.shape, case.max_entries + 5), torch.nan)[..., : case.max_entries]


def check(case: Case) -> None:
    directions, means, whitening = moments_of(case)
    results = []
    for run in (ops.key_scores, ops.key_scores.reference):
        distinctness, leverage = poisoned(case), poisoned(case)
        run(*case.keys, directions, distinctness, means, whitening, leverage)
        results.append((distinctness, leverage))
    (distinctness, leverage), expected = results
    assert_close(distinctness, expected[0], "distinctness")
    assert_close(leverage, expected[1], "leverage")
    alone = poisoned(case)
    ops.key_scores(*case.keys, directions, alone)
    assert_bitwise(alone, distinctness)


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
@pytest.mark.parametrize("length", [1, 16, 17, 128, 129, 700])
def test_lengths(length, block_size):
    check(make_case([length], block_size=block_size, num_layers=1, num_kv_heads=1))


def test_a_large_mean_is_taken_off_exactly():
    case = make_case([500], rotary_dim=0)
    case.keys[0].add_(30.0)
    check(case)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=3), st.booleans())
def test_any_batch(lens, is_neox):
    check(make_case(lens, block_size=8, is_neox=is_neox, num_layers=1))


def test_zero_vectors_have_no_cosine():
    case = make_case([20])
    case.keys[0][:, case.keys[1][0, 0]] = 0
    check(case)
    distinctness = poisoned(case)
    ops.key_scores(*case.keys, case.moments[0], distinctness)
    assert (distinctness[..., :16] == 1).all()
    ops.key_scores(*case.keys, torch.zeros_like(case.moments[0]), distinctness)
    assert (distinctness[..., :20] == 1).all()


def test_no_rows_and_no_entries():
    case = make_case([5])
    key, table, lens, *rotation = case.keys
    directions, scores = torch.ones_like(case.moments[0]), poisoned(case)
    ops.key_scores(key, table[:0], lens[:0], *rotation, directions[:, :0], scores[:, :0])
    ops.key_scores(key, table, lens - 5, *rotation, directions, scores[..., :0])


def arguments() -> list:
    case = make_case(LENS)
    directions, means, whitening = moments_of(case)
    return [*case.keys, directions, poisoned(case), means, whitening, poisoned(case)]


@pytest.mark.cpu_only
def test_opcheck():
    tensors = (t.nan_to_num() if isinstance(t, torch.Tensor) else t for t in arguments())
    torch.library.opcheck(torch.ops.ems_vllm.key_scores.default, tuple(tensors))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, torch.Tensor.double, "key_scores: key_cache must have dtype float32, bfloat16, "),
        (2, lambda t: t + 5, r"num_entries\[0\] must be in 0\.\.133, got 134"),
        (5, lambda t: t[..., 1:], r"directions must have shape \[2, 5, 2, 64\], got"),
        (6, torch.Tensor.double, "distinctness must have dtype Float, got Double"),
        (7, lambda t: None, "means, whitening and leverage must be given together"),
        (8, lambda t: t.mT, "whitening must be contiguous in its last dimension"),
        (9, lambda t: t[..., 1:], r"leverage must be as long as distinctness \(133\), got 132"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, change, message):
    args = arguments()
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.key_scores(*args)
