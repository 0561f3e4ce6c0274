# SPDX-License-Identifier: Apache-2.0
"""What is refused at start-up is exactly what the operators would refuse in the first step."""

from itertools import product

import pytest
import torch

import ems_vllm
from ems_vllm import ops
from ems_vllm.engine import kernels

QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = (*QUERY_DTYPES, torch.float8_e4m3fn)
# Of models that there are, and sizes beside them.
HEAD_SIZES = (32, 64, 72, 80, 96, 112, 120, 128, 192, 256, 320, 512)


@pytest.fixture
def device(implementation):
    if implementation == "cpu":
        return "cpu"
    if not ems_vllm.build_info()["cuda_archs"]:
        pytest.skip("built without CUDA kernels")
    return "cuda"


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def score_queries(query_dtype, cache_dtype, head_size):
    ops.score_queries(
        torch.zeros(1, 2, head_size, dtype=query_dtype),
        torch.zeros(2, 1, 16, head_size).to(cache_dtype),
        ints([1]),
        ints(0),
        ints(1),
        ints(1),
        ints(0),
        ints([1]),
        None,
        1.0,
        1,
        torch.zeros(2, 1, 16),
    )


def score_window(query_dtype, cache_dtype, head_size):
    ops.score_window(
        torch.zeros(1, 1, 2, 2, head_size, dtype=query_dtype),
        ints(0),
        ints(1),
        ints(1),
        torch.zeros(1, 2, 1, 16, head_size).to(cache_dtype),
        ints([1]),
        ints(1),
        ints(1),
        1.0,
        torch.zeros(1, 1, 1, 1),
    )


def assign_classes(cache_dtype, head_size):
    cache = torch.zeros(1, 2, 1, 16, head_size).to(cache_dtype)
    one = ints(0, 1).view(1, 1, 1, 2)
    ops.assign_classes(
        cache, cache.clone(), ints([1]), one, one + 2, ints(2), ints(0), 0.5, torch.empty_like(one)
    )


def merge_compact(cache_dtype, head_size):
    cache = torch.zeros(1, 2, 1, 16, head_size).to(cache_dtype)
    kept = torch.arange(16, dtype=torch.int32).view(1, 1, 1, 16)
    none = torch.full((1, 1, 1, 1), -1, dtype=torch.int32)
    ops.merge_compact(
        cache,
        cache.clone(),
        None,
        torch.ones(1, 1, 1, 16),
        None,
        0,
        False,
        None,
        ints([1]),
        kept,
        none,
        none,
        ints(16),
        ints(0),
    )


def vector_norms(cache_dtype, head_size):
    cache = torch.zeros(1, 2, 1, 16, head_size).to(cache_dtype)
    ops.vector_norms(cache, ints([1]), ints(1), torch.zeros(1, 1, 1, 1))


def key_moments(cache_dtype, head_size):
    key_cache = torch.zeros(1, 2, 1, 16, head_size).to(cache_dtype)
    sums = torch.zeros(1, 1, 1, head_size)
    ops.key_moments(key_cache, ints([1]), ints(1), None, False, sums)


def key_scores(cache_dtype, head_size):
    key_cache = torch.zeros(1, 2, 1, 16, head_size).to(cache_dtype)
    sums = torch.zeros(1, 1, 1, head_size)
    ops.key_scores(key_cache, ints([1]), ints(1), None, False, sums, torch.zeros(1, 1, 1, 1))


READ_THE_CACHE_ALONE = (assign_classes, merge_compact, vector_norms, key_moments, key_scores)


def accepts(operator, *arguments):
    try:
        operator(*arguments)
    except RuntimeError as error:
        if "head_size must be one of" in str(error) or "cache must have dtype" in str(error):
            return False
        raise
    return True


def name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("operator", [score_queries, score_window])
def test_operators_that_read_queries(device, operator):
    for query, cache, head_size in product(QUERY_DTYPES, CACHE_DTYPES, HEAD_SIZES):
        refusal = kernels.without_head_size(device, head_size) or kernels.without_dtypes(
            device, name(query), name(cache)
        )
        accepted = accepts(operator, query, cache, head_size)
        assert accepted == (refusal is None), (query, cache, head_size, refusal)


@pytest.mark.parametrize("operator", READ_THE_CACHE_ALONE)
def test_operators_that_read_the_cache_alone(device, operator):
    for cache, head_size in product((*CACHE_DTYPES, torch.float64), HEAD_SIZES):
        refusal = kernels.without_head_size(device, head_size) or kernels.without_cache_dtype(
            device, name(cache)
        )
        accepted = accepts(operator, cache, head_size)
        assert accepted == (refusal is None), (cache, head_size, refusal)


@pytest.mark.cpu_only
def test_refusals_name_what_there_is():
    build = ems_vllm.build_info()
    assert kernels.without_dtypes("cpu", "float32", "float8_e4m3fn") is None
    assert kernels.without_dtypes("cpu", "float16", "bfloat16") == (
        "float16 queries with a bfloat16 cache, for which there is no kernel on cpu (caches that "
        "go with them: float16 or float8_e4m3fn)"
    )
    if build["cuda_archs"]:
        refusal = kernels.without_dtypes("cuda", "float32", "float8_e4m3fn")
        assert refusal is not None
        assert refusal.endswith("no kernel on cuda (caches that go with them: float32)")
    assert bool(build["cuda_dtypes"]) == bool(build["cuda_archs"])
