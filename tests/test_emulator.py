# SPDX-License-Identifier: Apache-2.0
"""The emulator of tests/emulation notices the mistakes that CUDA kernels are prone to."""

import pytest
import torch
from emulation.build import operators

NUM_THREADS = 64
# As numbered in tests/emulation/faults.cpp.
NONE = 0
NO_BARRIER = 1
COPY_NOT_WAITED_FOR = 2
BARRIER_PASSED_BY = 3
TOO_LITTLE_SHARED = 4
TOO_MUCH_SHARED = 5
MISALIGNED_COPY = 6


def reversed_by_kernel(fault: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel that reverses rows wrote, and what it should have written."""
    operators()
    values = torch.arange(4.0 * (NUM_THREADS + 1))
    out = torch.zeros(NUM_THREADS, 4)
    torch.ops.ems_vllm_faults.reverse(values, out, fault)
    return out, values[: out.numel()].view_as(out).flip(0)


def test_kernel_without_mistakes():
    out, expected = reversed_by_kernel(NONE)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("fault", [NO_BARRIER, COPY_NOT_WAITED_FOR])
def test_what_was_not_waited_for_is_nan(fault):
    out, expected = reversed_by_kernel(fault)
    wrong = out != expected
    assert wrong.any()
    assert out[wrong].isnan().all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (BARRIER_PASSED_BY, "reverse: threads wait at a barrier that others passed by"),
        (TOO_LITTLE_SHARED, "a kernel uses more shared memory than its launch gives"),
        (TOO_MUCH_SHARED, "a CTA asks for more shared memory than the GPU has"),
        (MISALIGNED_COPY, "an asynchronous copy is not aligned"),
    ],
)
def test_what_a_gpu_would_fault_at_is_an_error(fault, message):
    with pytest.raises(RuntimeError, match=message):
        reversed_by_kernel(fault)
    # The next kernel is not affected.
    test_kernel_without_mistakes()
