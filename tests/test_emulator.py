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
MISALIGNED_COPY = 5
# What a CTA may have, in KiB, by compute capability.
SHARED_KIB = {
    "80": 163,
    "86": 99,
    "87": 163,
    "89": 99,
    "90": 227,
    "100": 227,
    "103": 227,
    "120": 99,
    "121": 99,
}


def reversed_by_kernel(fault: int, shared_bytes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel that reverses rows wrote, and what it should have written.

    Args:
        fault: The mistake that the kernel makes.
        shared_bytes: Of a CTA, where that is not what the kernel needs.
    """
    operators()
    values = torch.arange(4.0 * (NUM_THREADS + 1))
    out = torch.zeros(NUM_THREADS, 4)
    torch.ops.ems_vllm_faults.reverse(values, out, fault, shared_bytes)
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
        (MISALIGNED_COPY, "an asynchronous copy is not aligned"),
    ],
)
def test_what_a_gpu_would_fault_at_is_an_error(fault, message):
    with pytest.raises(RuntimeError, match=message):
        reversed_by_kernel(fault)
    # The next kernel is not affected.
    test_kernel_without_mistakes()


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_a_kernel_gets_no_more_shared_memory_than_its_gpu_has(monkeypatch, capability):
    monkeypatch.setenv("EMS_EMULATED_CAPABILITY", capability)
    most = SHARED_KIB[capability] << 10
    out, expected = reversed_by_kernel(NONE, most)
    assert torch.equal(out, expected)
    message = f"reverse: a CTA asks for {most + 1} bytes of shared memory, the GPU gives {most}"
    with pytest.raises(RuntimeError, match=message):
        reversed_by_kernel(NONE, most + 1)


def test_the_smallest_gpu_is_emulated_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("EMS_EMULATED_CAPABILITY", raising=False)
    least = min(SHARED_KIB.values()) << 10
    reversed_by_kernel(NONE, least)
    with pytest.raises(RuntimeError, match=f"the GPU gives {least}"):
        reversed_by_kernel(NONE, least + 1)


def test_a_gpu_that_is_not_known_is_an_error(monkeypatch):
    monkeypatch.setenv("EMS_EMULATED_CAPABILITY", "75")
    with pytest.raises(RuntimeError, match="EMS_EMULATED_CAPABILITY=75 is no GPU"):
        reversed_by_kernel(NONE)


@pytest.mark.parametrize(
    ("num_items", "scratch", "group", "expected"),
    [
        (0, 8, 1, []),
        # A grid has at most 65535 CTAs in y, however little memory an item needs.
        (65536, 0, 1, [65535, 1]),
        (70000, 16, 1, [65535, 4465]),
        (80000, 0, 8, [65528, 14472]),
        # 32 MiB at a time.
        (5, 16 << 20, 1, [2, 2, 1]),
        (2, 64 << 20, 1, [1, 1]),
        # Whole groups, at least one.
        (0, 8, 4, []),
        (9, 4 << 20, 3, [6, 3]),
        (8, 16 << 20, 4, [4, 4]),
        (6, 64 << 20, 3, [3, 3]),
    ],
)
def test_batches_of_items_fit_a_grid_and_scratch_memory(num_items, scratch, group, expected):
    operators()
    sizes = torch.zeros(8, dtype=torch.int64)
    num_batches = torch.ops.ems_vllm_faults.item_batches(sizes, num_items, scratch, group)
    assert sizes[:num_batches].tolist() == expected
