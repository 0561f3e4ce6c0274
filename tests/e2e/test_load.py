# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, some of which leave early: nothing is lost (at size: `make load`)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2e.clients import complete, prompt
from e2e.load import CONFIGURATIONS, Configuration, measure
from e2e.load_clients import Answer, Case, Job, answers_alone, make_cases, make_jobs
from e2e.load_result import (
    MAX_GROWTH_MIB,
    NEAR_TIE,
    MemorySample,
    compare,
    steady_growth_mib,
)

from ems_vllm.eval.server.process import Server

NUM_CLIENTS = 24
MAX_LEN = 800
# With few requests, and a pool that holds one of them, a prefix is rarely there when the next that
# shares it comes: so every second shares one.
CASES = make_cases(NUM_CLIENTS, seed=0, max_len=MAX_LEN, shared_every=2)
JOBS = make_jobs(CASES, 2 * NUM_CLIENTS, seed=7)


def test_jobs_are_of_every_kind() -> None:
    """The control of the tests below."""
    stays = [job for job in JOBS if job.leaves_after_s is None and job.leaves_after_tokens is None]
    assert {job.is_streamed for job in stays} == {False, True}
    assert {job.case_idx for job in stays} == set(range(NUM_CLIENTS))
    assert any(job.leaves_after_s is not None for job in JOBS)
    assert any(job.leaves_after_tokens is not None for job in JOBS)
    assert {len(case.prompt) for case in CASES} >= {10, MAX_LEN}
    assert any(case.xargs is not None for case in CASES)


@pytest.mark.parametrize(
    ("token_ids", "is_finished", "gap", "num_differences", "num_near_ties"),
    [
        pytest.param([1, 2, 3], True, 1.0, 0, 0, id="right"),
        pytest.param([1, 2], False, 1.0, 0, 0, id="right until the client left"),
        pytest.param([1, 5, 3], True, 1.0, 1, 0, id="wrong"),
        pytest.param([1, 5], False, 1.0, 1, 0, id="wrong until the client left"),
        pytest.param([1, 5, 3], True, NEAR_TIE / 2, 1, 1, id="either is right"),
    ],
)
def test_a_wrong_answer_is_noticed(
    token_ids: list[int], is_finished: bool, gap: float, num_differences: int, num_near_ties: int
) -> None:
    alone = Answer([1, 2, 3], [1.0, gap, 1.0], is_finished=True)
    answered = [(Job(0), Answer(token_ids, is_finished=is_finished))]
    differences = compare([Case([7, 8], 3, None)], [alone], answered)
    assert len(differences) == num_differences
    assert sum(difference.is_near_tie for difference in differences) == num_near_ties


@pytest.mark.parametrize(
    ("memory", "is_lost"),
    [
        pytest.param(lambda part: 1100, False, id="flat"),
        pytest.param(lambda part: 1100 + 20 * (part > 0.5), False, id="one step"),
        pytest.param(lambda part: 1100 + 20 * part, True, id="a little with every request"),
    ],
)
def test_memory_that_is_lost_with_every_request_is_noticed(
    memory: Callable[[float], float], is_lost: bool
) -> None:
    samples = [MemorySample(50 * i, 500, memory(i / 40) - 500) for i in range(40)]
    assert (steady_growth_mib(samples) > MAX_GROWTH_MIB) == is_lost


@pytest.fixture(scope="module", params=("knorm", "ems"))
def configuration(request: Any) -> Configuration:
    (found,) = (c for c in CONFIGURATIONS if c.name == request.param)
    return found


@pytest.fixture(scope="module")
def small_server(start_server: Any, configuration: Configuration) -> Iterator[Server]:
    """A server that has to preempt: its pool holds little more than the longest request."""
    with start_server("random-llama", *configuration.arguments(MAX_LEN)) as running:
        yield running


def test_every_answer_is_the_one_the_request_gets_alone(
    small_server: Server, configuration: Configuration
) -> None:
    """Whatever was preempted, hit a prefix, or lost its neighbours in the batch."""
    alone = answers_alone(small_server, CASES)
    expectation = configuration.expectation(CASES)
    result = measure(
        small_server,
        configuration.name,
        expectation,
        CASES,
        alone,
        JOBS,
        NUM_CLIENTS,
    )
    assert result.violations() == []
    assert result.num_left_streaming > 0
    # The pool is whole: a request that needs nearly all of it is served.
    assert complete(small_server, prompt(MAX_LEN, seed=40), 16)
