# SPDX-License-Identifier: Apache-2.0
"""The null GPU refuses what CUDA refuses; else the other tests of this folder could not fail."""

import ctypes
import os
from contextlib import contextmanager

import pytest
import torch
from nullgpu.trace import listening, short_name
from processes import run_script

CAPTURE_UNSUPPORTED = 900


def runtime():
    return ctypes.CDLL("libcudart.so.13")


@contextmanager
def capturing(stream=None):
    """A capture on a stream of its own, thrown away afterwards."""
    stream = stream or torch.cuda.Stream()
    handle, graph = ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p()
    with torch.cuda.stream(stream):
        assert runtime().cudaStreamBeginCapture(handle, 0) == 0
        ended = []
        try:
            yield stream, ended
        finally:
            ended.append(runtime().cudaStreamEndCapture(handle, ctypes.byref(graph)))
            # Or torch would find it.
            runtime().cudaGetLastError()


def test_copies_are_made_and_a_graph_makes_them_again():
    source = torch.arange(5).cuda()
    target = torch.zeros(len(source), dtype=torch.int64).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        target.copy_(source)
    assert target.tolist() == [0] * 5
    graph.replay()
    assert target.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda library, stream: library.cudaStreamSynchronize(ctypes.c_void_p(stream.cuda_stream)),
        lambda library, stream: library.cudaDeviceSynchronize(),
        lambda library, stream: library.cudaMalloc(ctypes.byref(ctypes.c_void_p()), 4096),
        lambda library, stream: library.cudaFree(None),
        lambda library, stream: library.cudaMemcpy(None, None, 0, 4),
    ],
    ids=["synchronize stream", "synchronize device", "allocate", "free", "copy and wait"],
)
def test_a_capture_does_not_survive_what_it_cannot_hold(call):
    with capturing() as (stream, ended), listening() as events:
        assert call(runtime(), stream) == CAPTURE_UNSUPPORTED
    assert ended == [901]
    assert [event.name.split()[0] for event in events if event.kind == "error"][:1] == ["900"]
    # All is well again afterwards.
    torch.cuda.synchronize()


def test_a_stream_that_is_forked_has_to_come_back():
    side = torch.cuda.Stream()
    source = torch.arange(3).cuda()
    target = torch.zeros(len(source), dtype=torch.int64).cuda()
    with capturing() as (stream, ended):
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            target.copy_(source)
        stream.wait_stream(side)
    assert ended == [0]
    with capturing() as (stream, ended):
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            target.copy_(source)
    assert ended == [904]
    assert target.tolist() == [0, 0, 0]


def test_work_beside_a_capture_is_seen():
    other = torch.cuda.Stream()
    source, target = torch.arange(3).cuda(), torch.zeros(3, dtype=torch.int64).cuda()
    with listening() as events, capturing(), torch.cuda.stream(other):
        target.copy_(source)
    assert [event.kind for event in events if event.how == "beside"] == ["copy"]
    assert target.tolist() == [0, 1, 2]


def test_a_stream_takes_work_of_its_own_device_only():
    script = """
import ctypes, json, torch
stream = torch.cuda.Stream(device=1)
with torch.cuda.device(0):
    error = ctypes.CDLL("libcudart.so.13").cudaMemsetAsync(
        None, 0, ctypes.c_size_t(0), ctypes.c_void_p(stream.cuda_stream))
print(json.dumps(error))
"""
    assert run_script(script, None, os.environ | {"NULLGPU_COUNT": "2"}) == 400


def test_names_of_kernels_are_short():
    name = "void ems::(anonymous namespace)::copy_kernel<float, ems::Type<int>>(ems::Params)"
    assert short_name(name) == "ems::(anonymous namespace)::copy_kernel"
    assert short_name("_triton_kernel_0") == "_triton_kernel_0"
    assert short_name("device to pinned") == "device to pinned"
