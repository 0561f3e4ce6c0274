# SPDX-License-Identifier: Apache-2.0
"""record_queries: exact copies to the named slots and nowhere else."""

import pytest
import torch
from compare import assert_bitwise

from ems_vllm import ops


def make_args(
    num_tokens: int, dtype: torch.dtype = torch.float32, head_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries sliced out of a projection, two in three recorded, and one layer of a ring."""
    projection = torch.randn(num_tokens, 6, head_size).to(dtype)
    ring = torch.full((2, 5, 8, 4, head_size), float("nan"), dtype=dtype)[1]
    slots = torch.randperm(40)[:num_tokens]
    slots[::3] = -1
    return projection[:, :4], slots, ring


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 40])
def test_copies_to_the_named_slots(num_tokens, dtype, head_size):
    query, slots, ring = make_args(num_tokens, dtype, head_size)
    expected = ring.clone()
    ops.record_queries.reference(query, slots, expected)
    ops.record_queries(query, slots, ring)
    assert_bitwise(ring, expected)


def test_strided_ring():
    query, slots, _ = make_args(17)
    ring = torch.zeros(8, 5, 4, 2 * 64).transpose(0, 1)[..., 64:]
    expected = ring.clone()
    ops.record_queries.reference(query, slots, expected)
    ops.record_queries(query, slots, ring)
    assert_bitwise(ring, expected)


@pytest.mark.cpu_only
def test_opcheck():
    query, slots, ring = make_args(7)
    ops.record_queries(query, slots, ring)
    args = (query, slots, ring.nan_to_num())
    torch.library.opcheck(torch.ops.ems_vllm.record_queries.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, s, r: (q, s.int(), r), "record_queries: ring_slots must have dtype Long"),
        (lambda q, s, r: (q, s[1:], r), r"ring_slots must have shape \[7\], got \[6\]"),
        (lambda q, s, r: (q.half(), s, r), "ring must have dtype Half, got Float"),
        (lambda q, s, r: (q[:, :2], s, r), r"ring must have shape \[\*, \*, 2, 64\]"),
        (lambda q, s, r: (q, s + 40, r), r"ring_slots\[1\] must be in 0\.\.39, got"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(change, message):
    query, slots, ring = make_args(7)
    with pytest.raises(RuntimeError, match=message):
        ops.record_queries(*change(query, slots, ring))
