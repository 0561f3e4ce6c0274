# SPDX-License-Identifier: Apache-2.0
"""The operators' launches: on whose device and stream, how many, and whether a GPU takes them."""

import json
import os

import pytest
import torch
from nullgpu.trace import listening
from opbench import cases, verify
from opbench.shapes import Model, Shape
from processes import run_script

from ems_vllm import build_info, ops

# The most that one call launches, on all layers and requests; scratch fits one batch here.
MOST_LAUNCHES = {
    "record_queries": 1,
    "shift_block_tables": 1,
    "head_pages": 1,
    "score_queries": 2,
    "score_window": 2,
    "vector_norms": 1,
    "key_moments": 2,
    "key_scores": 1,
    "rank_entries": 1,
    "select_entries": 1,
    "assign_classes": 2,
    "merge_compact": 3,
}
CAPTURED_BY_DECODING = ("record_queries", "shift_block_tables", "head_pages")

_ON_ANOTHER_GPU = """
import json, torch
from nullgpu.test_operators import arguments, launches_of
for dtype in (torch.bfloat16, torch.float32):
    for name, args in arguments(128, dtype, "cuda:1"):
        stream = torch.cuda.Stream(device=1)
        with torch.cuda.stream(stream), torch.cuda.device(0):
            found = launches_of(name, args)
            assert torch.cuda.current_device() == 0
        assert found, name
        assert {event.device for event in found} == {1}, (name, found)
        assert len({event.stream for event in found}) == 1, (name, found)
        # Not the default stream, whose number is the device's.
        assert found[0].stream > 1, (name, found)
print(json.dumps("done"))
"""
_ALL_SIZES = """
import json, torch
from ems_vllm import build_info
from nullgpu.test_operators import arguments, launches_of
names = set()
for head_size in build_info()["cuda_head_sizes"]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, args in arguments(head_size, dtype, "cuda"):
            names |= {event.name for event in launches_of(name, args)}
print(json.dumps(sorted(names)))
"""


def arguments(head_size, dtype=torch.bfloat16, device="cuda"):
    """Every operator with arguments for a small model, made by the CPU."""
    model = Model("small", 2, 8, 2, head_size)
    shape = Shape(model, 300, 2, cases.budget_of(300), dtype, torch.device("cpu"))
    return [
        (name, tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args))
        for name, args in verify.arguments(shape)
    ]


def events_of(name, args):
    with listening() as events:
        getattr(ops, name)(*args)
    return events


def launches_of(name, args):
    events = events_of(name, args)
    refused = [event for event in events if event.kind == "error"]
    assert not refused, (name, refused)
    return [event for event in events if event.is_ours]


def test_every_operator_is_covered():
    assert {name for name, _ in arguments(64)} == set(MOST_LAUNCHES)


@pytest.mark.parametrize("head_size", build_info()["cuda_head_sizes"])
def test_an_operator_launches_little_and_waits_for_nothing(head_size):
    for name, args in arguments(head_size):
        getattr(ops, name)(*args)
        events = events_of(name, args)
        assert 0 < sum(event.is_ours for event in events) <= MOST_LAUNCHES[name], name
        assert [e for e in events if e.kind in ("synchronize", "allocate", "copy")] == [], name
        assert {event.stream for event in events} == {0}, name


@pytest.mark.parametrize(("num_queries", "is_shared"), [(16, True), (None, False)])
def test_keys_of_few_queries_are_shared_out(num_queries, is_shared):
    """So that the pass over queries has more CTAs than tiles of queries."""
    shape = Shape(Model("small", 1, 8, 2, 64), 8192, 1, 512, torch.bfloat16, torch.device("cuda"))
    args = cases.score_queries_args(shape, 1, False, num_queries)
    names = [event.name for event in launches_of("score_queries", args)]
    assert ("ems::combine_lse_kernel" in names) == is_shared
    assert len(names) == 2 + is_shared


@pytest.mark.parametrize("name", CAPTURED_BY_DECODING)
def test_what_a_decoding_graph_holds_allocates_nothing(name):
    (args,) = (args for found, args in arguments(128) if found == name)
    graph = torch.cuda.CUDAGraph()
    with listening() as events, torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        getattr(ops, name)(*args)
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert allocated == 0
    ours = [event for event in events if event.is_ours]
    assert [event.how for event in ours] == ["captured"]
    with listening() as events:
        graph.replay()
    assert [event.how for event in events if event.is_ours] == ["replayed"]


def test_an_operator_runs_on_its_tensors_gpu_and_that_ones_stream():
    """Also where another GPU is the current one, as in a process that uses several."""
    environment = os.environ | {"NULLGPU_COUNT": "2"}
    assert run_script(_ON_ANOTHER_GPU, None, environment) == "done"


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_kernel_fits_the_shared_memory_of_every_gpu(capability):
    """All head sizes and dtypes; a launch that asks for more is refused."""
    environment = os.environ | {"NULLGPU_CAPABILITY": str(capability)}
    names = run_script(_ALL_SIZES, None, environment)
    assert ("ems::score_queries_sm90_kernel" in names) == (capability == 90), json.dumps(names)
