# SPDX-License-Identifier: Apache-2.0
"""Assertions on operator results. What is allowed to differ, and by how much, is in TOLERANCES."""

import torch

# kind -> dtype of the result -> (rtol, atol)
TOLERANCES = {
    # Sums of probabilities in float32, against float64. A logit of 10 with an error of 1e-6 of its
    # size is an error of 1e-5 in the probability.
    "scores": {torch.float32: (1e-4, 1e-6)},
    # Square roots of sums of at most 256 squares in float32.
    "norms": {torch.float32: (1e-6, 0.0)},
    # 1 minus a cosine in float32.
    "distinctness": {torch.float32: (1e-5, 2e-6)},
    # Squares of differences, where the matrix is no larger than what it makes of the keys allows.
    "leverage": {torch.float32: (2e-4, 1e-6)},
    # Weighted means rounded once, to the cache's dtype: the two sides may fall on either side of a
    # rounding boundary, one unit in the last place.
    "merged": {
        torch.float32: (2e-5, 1e-6),
        torch.bfloat16: (2**-7, 1e-5),
        torch.float16: (2**-10, 1e-5),
        torch.float8_e4m3fn: (2**-3, 2**-9),
    },
}

_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_INT_OF_SIZE[tensor.element_size()])


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, NaN payloads and signs of zero included."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    differing = (_bits(actual) != _bits(expected)).nonzero()
    assert len(differing) == 0, f"{len(differing)} differ, the first at {differing[0].tolist()}"


def assert_untouched(after: torch.Tensor, before: torch.Tensor, written: torch.Tensor) -> None:
    """Equal bit for bit wherever the mask `written` is False."""
    written = written.expand_as(after)
    assert torch.equal(_bits(after)[~written], _bits(before)[~written])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    """NaN in the same places, and elsewhere within the tolerance of `kind`."""
    rtol, atol = TOLERANCES[kind][actual.dtype]
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_close_sum(actual: torch.Tensor, expected: torch.Tensor, sizes: torch.Tensor) -> None:
    """NaN in the same places, and elsewhere as close as sums of some tens of values in float32 are.

    Args:
        actual: Rounded once, like "merged".
        expected: Like actual.
        sizes: The same sums of magnitudes: where values cancel, the error is of their size.
    """
    assert actual.dtype == expected.dtype
    rtol, _ = TOLERANCES["merged"][actual.dtype]
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected, sizes = (tensor.double() for tensor in (actual, expected, sizes))
    excess = (actual - expected).abs() - rtol * expected.abs() - 16 * 2**-24 * sizes
    worst = excess.nan_to_num(-1.0).max().item()
    assert worst <= 0, f"{worst} more than allowed"
