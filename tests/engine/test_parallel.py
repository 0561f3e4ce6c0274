# SPDX-License-Identifier: Apache-2.0
"""Tensor and pipeline parallelism over gloo: answers equal to one process."""

import pytest
from engine.harness import LLAMA, QUERY_HEADS, engine, tokens
from engine.workers import answers_of_workers

pytestmark = pytest.mark.slow

COMPRESSION = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
LENGTHS = (700, 40, 333, 500)
MAX_TOKENS = 100


@pytest.fixture(scope="module")
def expected():
    prompts = [tokens(length, seed=length) for length in LENGTHS]
    with engine(COMPRESSION, LLAMA, max_model_len=2048) as probe:
        return prompts, probe.generate(prompts, MAX_TOKENS), probe.stats()


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "tova", "selector": "chunks"},
        {"recipe": "criticalkv"},
        {"recipe": "compresskv", "scorer": {"profile": QUERY_HEADS}, "allocator": "uniform"},
    ],
    ids=["tova", "criticalkv", "compresskv"],
)
def test_ranks_choose_for_all_heads_of_a_layer(settings):
    """Or read what their own ones have of the layer's output projection."""
    compression = {**COMPRESSION, **settings}
    prompts = [tokens(length, seed=length) for length in LENGTHS]
    with engine(compression, LLAMA, max_model_len=2048) as probe:
        expected = probe.generate(prompts, MAX_TOKENS)
    found = answers_of_workers(LLAMA, compression, {"tensor_parallel_size": 2}, prompts, MAX_TOKENS)
    assert found.answers == expected


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [({"tensor_parallel_size": 2}, [4, 4]), ({"pipeline_parallel_size": 2}, [2, 2])],
    ids=["tensor", "pipeline"],
)
def test_two_workers_answer_as_one(parallel, layers, expected):
    prompts, answers, stats = expected
    # One of them measures what compactions change, and all split their work alike.
    measuring = {**COMPRESSION, "guard_share": 0.5}
    found = answers_of_workers(LLAMA, measuring, parallel, prompts, MAX_TOKENS)
    assert found.answers == answers
    assert [rank[0]["num_layers"] for rank in found.stats] == layers
    compactions = [rank[0]["num_compactions"] for rank in found.stats]
    assert compactions == [stats["num_compactions"]] * 2
