# SPDX-License-Identifier: Apache-2.0
"""The operators of a decoding step in CUDA graphs: captured once, replayed on new contents."""

from collections.abc import Callable

import pytest
import torch
from compare import assert_bitwise

from ems_vllm import ops

pytestmark = pytest.mark.gpu

NUM_ROWS, NUM_COLUMNS, BLOCK_SIZE = 5, 40, 16
WINDOW, NUM_HEADS, HEAD_SIZE = 8, 4, 128


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of the call, which has run before as vLLM's warm-up does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def refill(tensor: torch.Tensor, low: int, high: int) -> None:
    """Random integers, made by the CPU: all that runs on the GPU is what is tested."""
    tensor.copy_(torch.randint(low, high, tensor.shape, dtype=tensor.dtype))


def new_slots() -> torch.Tensor:
    slots = torch.randperm(NUM_ROWS * WINDOW)[:NUM_ROWS]
    slots[::2] = -1
    return slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_record_queries(dtype):
    query = torch.randn(NUM_ROWS, NUM_HEADS, HEAD_SIZE).to("cuda", dtype)
    ring = torch.zeros(NUM_ROWS, WINDOW, NUM_HEADS, HEAD_SIZE, dtype=dtype).cuda()
    slots = torch.full((NUM_ROWS,), -1).cuda()
    graph = captured(lambda: ops.record_queries(query, slots, ring))
    assert not ring.cpu().any()
    expected = ring.cpu()
    for _ in range(4):
        query.copy_(torch.randn(query.shape))
        slots.copy_(new_slots())
        graph.replay()
        ops.record_queries.reference(query.cpu(), slots.cpu(), expected)
        assert_bitwise(ring.cpu(), expected)


def test_shift_block_tables():
    table = torch.zeros(NUM_ROWS, NUM_COLUMNS, dtype=torch.int32).cuda()
    lens, first = (torch.zeros(NUM_ROWS, dtype=torch.int32).cuda() for _ in range(2))
    outputs = torch.empty_like(table), torch.empty_like(lens)
    graph = captured(lambda: ops.shift_block_tables(table, lens, first, BLOCK_SIZE, *outputs))
    for _ in range(4):
        refill(table, 1, 1000)
        refill(lens, 1, BLOCK_SIZE * NUM_COLUMNS)
        refill(first, 0, NUM_COLUMNS + 2)
        graph.replay()
        expected = torch.empty_like(table, device="cpu"), torch.empty_like(lens, device="cpu")
        ops.shift_block_tables.reference(
            table.cpu(), lens.cpu(), first.cpu(), BLOCK_SIZE, *expected
        )
        for got, want in zip(outputs, expected, strict=True):
            assert_bitwise(got.cpu(), want)


def test_head_pages():
    num_heads, num_dealt = 3, NUM_COLUMNS // 2
    table = torch.zeros(NUM_ROWS, NUM_COLUMNS, dtype=torch.int32).cuda()
    lens, places = (torch.zeros(NUM_ROWS, dtype=torch.int32).cuda() for _ in range(2))
    starts = torch.zeros(NUM_ROWS, num_heads + 1, dtype=torch.int32).cuda()
    width = num_dealt * num_heads + NUM_COLUMNS - num_dealt
    expected = (
        torch.full((NUM_ROWS * num_heads, width), -7, dtype=torch.int32),
        torch.full((NUM_ROWS * num_heads,), -7, dtype=torch.int32),
    )
    outputs = tuple(tensor.cuda() for tensor in expected)
    graph = captured(lambda: ops.head_pages(table, lens, places, starts, BLOCK_SIZE, *outputs))
    for _ in range(4):
        refill(table, 1, 1000)
        # Some rows pad the batch.
        refill(lens, -BLOCK_SIZE * NUM_COLUMNS // 2, BLOCK_SIZE * NUM_COLUMNS)
        places.copy_(torch.randperm(NUM_ROWS, dtype=torch.int32))
        dealt = torch.randint(0, num_dealt * num_heads + 1, starts.shape, dtype=torch.int32)
        dealt[:, 0], dealt[:, -1] = 0, num_dealt * num_heads
        starts.copy_(dealt.sort().values)
        graph.replay()
        args = [tensor.cpu() for tensor in (table, lens, places, starts)]
        ops.head_pages.reference(*args, BLOCK_SIZE, *expected)
        for got, want in zip(outputs, expected, strict=True):
            assert_bitwise(got.cpu(), want)


def test_both_in_one_graph_on_another_stream():
    """As in a decoding step, where the metadata is built before the layers record."""
    query = torch.randn(NUM_ROWS, NUM_HEADS, HEAD_SIZE).to("cuda", torch.bfloat16)
    rings = torch.zeros(3, NUM_ROWS, WINDOW, NUM_HEADS, HEAD_SIZE, dtype=query.dtype).cuda()
    slots = torch.full((NUM_ROWS,), -1).cuda()
    table = torch.zeros(NUM_ROWS, NUM_COLUMNS, dtype=torch.int32).cuda()
    lens, first = (torch.zeros(NUM_ROWS, dtype=torch.int32).cuda() for _ in range(2))
    outputs = torch.empty_like(table), torch.empty_like(lens)

    def step() -> None:
        ops.shift_block_tables(table, lens, first, BLOCK_SIZE, *outputs)
        for ring in rings:
            ops.record_queries(query, slots, ring)

    graph = captured(step)
    slots.copy_(new_slots())
    refill(table, 1, 1000)
    refill(lens, 1, BLOCK_SIZE * NUM_COLUMNS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.replay()
    stream.synchronize()
    expected = torch.zeros_like(rings[0], device="cpu")
    ops.record_queries.reference(query.cpu(), slots.cpu(), expected)
    for ring in rings:
        assert_bitwise(ring.cpu(), expected)
    assert_bitwise(outputs[0].cpu(), table.cpu())


def test_work_goes_to_the_current_stream():
    """A launch on another stream would overtake the copy that fills its input."""
    size = 1 << 24
    source = torch.randn(size // (NUM_HEADS * HEAD_SIZE), NUM_HEADS, HEAD_SIZE).pin_memory()
    query = torch.zeros_like(source).cuda()
    ring = torch.zeros(len(source), 1, NUM_HEADS, HEAD_SIZE).cuda()
    slots = torch.arange(len(source)).cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        query.copy_(source, non_blocking=True)
        ops.record_queries(query, slots, ring)
    stream.synchronize()
    assert_bitwise(ring.cpu().flatten(0, 1), source)
