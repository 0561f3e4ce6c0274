# SPDX-License-Identifier: Apache-2.0
"""The allocator `ada`: kv_heads share what a layer keeps by their scores, in whole pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies.contexts import BLOCK_SIZE, Row, build_context, heads_as_rows
from policies.test_workspace import Allocations

from ems_vllm.config import load_config
from ems_vllm.policies.allocators.ada import AdaAllocator
from ems_vllm.policies.base import Scores
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy


@dataclass(frozen=True)
class Request:
    """Scores of the entries of each kv_head, in whole pages; leading ones that always stay, and
    pages that each head would keep if all kept as many."""

    scores: list[list[float]]
    num_protected: int
    budget: int

    @property
    def num_heads(self) -> int:
        return len(self.scores)

    @property
    def least(self) -> int:
        return max(1, math.ceil(self.num_protected / BLOCK_SIZE))

    @property
    def most(self) -> list[int]:
        return [len(of_head) // BLOCK_SIZE for of_head in self.scores]


def context_of(requests: list[Request]) -> CompactionContext:
    """What an allocator sees of requests."""

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    lengths = [len(of_head) for one in requests for of_head in one.scores]
    return replace(
        build_context([Row(BLOCK_SIZE, 1, BLOCK_SIZE)]),
        num_entries=ints(lengths),
        num_protected=ints([one.num_protected for one in requests for _ in one.scores]),
        max_entries=max(lengths),
        rows_together=requests[0].num_heads,
    )


def weights_of(requests: list[Request]) -> torch.Tensor:
    heads = [torch.tensor(of_head) for one in requests for of_head in one.scores]
    return torch.nn.utils.rnn.pad_sequence(heads, batch_first=True)[None, :, None]


def deal(requests: list[Request], safeguard: float = 0.2) -> list[list[int]]:
    context, scores = context_of(requests), Scores(weights_of(requests))
    budgets = [one.budget * BLOCK_SIZE for one in requests]
    dealt = AdaAllocator(safeguard=safeguard).deal(context, scores, budgets)
    assert dealt.dtype == torch.int64
    return dealt.tolist()


@st.composite
def cases(draw: st.DrawFn) -> list[Request]:
    """Requests of different lengths and budgets, heads of different lengths, no score twice."""
    num_heads = draw(st.integers(1, 4))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        budget = draw(st.integers(1, 5))
        num_protected = draw(st.integers(0, budget * BLOCK_SIZE))
        least = max(1, math.ceil(num_protected / BLOCK_SIZE))
        pages = [draw(st.integers(least, 9)) for _ in range(num_heads)]
        # Of all heads together there are at least as many as are kept.
        pages[-1] += max(0, budget * num_heads - sum(pages))
        shuffled = np.random.default_rng(draw(st.integers(0, 99)))
        scores = shuffled.permutation(sum(pages) * BLOCK_SIZE).astype(float)
        # One head may have much higher ones than another.
        parts = np.split(scores, np.cumsum(pages)[:-1] * BLOCK_SIZE)
        bias = draw(st.sampled_from((0, 50, 1000)))
        heads = [(part + bias * head * 1.0001).tolist() for head, part in enumerate(parts)]
        found.append(Request(heads, num_protected, budget))
    return found


def wanted(request: Request, safeguard: float) -> list[float]:
    """Pages of each head by the paper's rule."""
    entries = [
        (math.inf if at < request.num_protected else score, head)
        for head, of_head in enumerate(request.scores)
        for at, score in enumerate(of_head)
    ]
    budget = request.budget * BLOCK_SIZE
    best = [head for _, head in sorted(entries, reverse=True)[: request.num_heads * budget]]
    return [
        (safeguard * budget + (1 - safeguard) * best.count(head)) / BLOCK_SIZE
        for head in range(request.num_heads)
    ]


@given(cases(), st.sampled_from((0.0, 0.2, 0.7, 1.0)))
def test_heads_get_what_the_papers_rule_says(requests, safeguard):
    dealt = deal(requests, safeguard)
    assert dealt == deal(requests, safeguard)
    for request, pages in zip(requests, dealt, strict=True):
        assert sum(pages) == request.num_heads * request.budget
        bounds = zip(pages, request.most, strict=True)
        assert all(request.least <= count <= most for count, most in bounds)
        # No page would lie closer to what is wanted in another head.
        beyond = [
            count - want for count, want in zip(pages, wanted(request, safeguard), strict=True)
        ]
        gives = [b for b, count in zip(beyond, pages, strict=True) if count > request.least]
        takes = [
            b for b, count, most in zip(beyond, pages, request.most, strict=True) if count < most
        ]
        assert max(gives, default=-math.inf) - min(takes, default=math.inf) <= 1 + 1e-6


@given(cases())
def test_requests_do_not_depend_on_each_other(requests):
    assert deal(requests) == [deal([request])[0] for request in requests]


def test_worked_example():
    """Two heads of 10 pages, 4 are kept of each."""

    def heads(low: int) -> Request:
        """Of the 8 best pages `low` are of the first head."""
        best, others = [2.0] * BLOCK_SIZE, [1.0] * BLOCK_SIZE
        return Request(
            [best * low + others * (10 - low), best * (8 - low) + others * (2 + low)], 0, 4
        )

    # 0.2 * 4 + 0.8 * 1 = 1.6, and 6.4.
    assert deal([heads(1), heads(4), heads(7)]) == [[2, 6], [4, 4], [6, 2]]
    assert deal([heads(1)], safeguard=0) == [[1, 7]]
    assert deal([heads(1)], safeguard=1) == [[4, 4]]
    # All of the best are of one head: the other one keeps a page.
    assert deal([heads(0)], safeguard=0) == [[1, 7]]


def test_half_a_page_goes_to_the_lower_head():
    half = BLOCK_SIZE // 2
    # Of the 6 pages of the best entries.
    heads = [[2.0] * half * count + [1.0] * half * (10 - count) for count in (5, 5, 2)]
    assert deal([Request(heads, 0, 2)], safeguard=0) == [[3, 2, 1]]


@pytest.mark.parametrize("num_protected", [0, 3, 2 * BLOCK_SIZE])
def test_heads_of_equal_scores_have_equal_pages(num_protected):
    """Also where all entries tie, and none is better than those that count as the best."""
    alike = [[float(entry // 3) for entry in range(6 * BLOCK_SIZE)]] * 3
    assert deal([Request(alike, num_protected, 4)]) == [[4, 4, 4]]
    zeros = [[0.0] * 6 * BLOCK_SIZE] * 3
    assert deal([Request(zeros, num_protected, 4)]) == [[4, 4, 4]]


def test_protected_entries_have_room_in_every_head():
    worthless, precious = [0.0] * 6 * BLOCK_SIZE, [1.0] * 6 * BLOCK_SIZE
    request = Request([worthless, precious], BLOCK_SIZE + 1, 3)
    assert deal([request], safeguard=0) == [[2, 4]]
    # A budget that they fill leaves nothing to share.
    assert deal([replace(request, num_protected=3 * BLOCK_SIZE)], safeguard=0) == [[3, 3]]


def test_attention_counts_where_scores_are_ranks():
    ranks = [[1 / (1 + entry) for entry in range(4 * BLOCK_SIZE)]] * 2
    request = Request(ranks, 0, 2)
    mass = weights_of([request])
    mass[:, 1] *= 1000
    scores = Scores(weights_of([request]), mass=mass)
    budgets = [2 * BLOCK_SIZE]
    allocator = AdaAllocator(safeguard=0)
    assert allocator.deal(context_of([request]), scores, budgets).tolist() == [[1, 3]]
    assert deal([request], safeguard=0) == [[2, 2]]


@pytest.mark.parametrize("recipe", ["ems", "h2o", "snapkv", "knorm", "random", "streaming_llm"])
def test_scoring_depends_neither_on_budgets_nor_on_targets(recipe):
    """So that there can be scores before anything is dealt."""
    context = heads_as_rows(build_context([Row(64, 9, 24, seed=1), Row(40, 5, 32, seed=2)]))
    policy = Policy.from_config(load_config(recipe))
    unknown = torch.full_like(context.budgets, -7)
    other = replace(context, budgets=unknown, target_columns=unknown, max_budget=-7)
    expected, found = policy.score(context), policy.score(other)
    for name in ("weights", "carry", "mass"):
        one, another = getattr(expected, name), getattr(found, name)
        assert (one is None) == (another is None)
        if one is not None and another is not None:
            assert torch.equal(one, another)


@pytest.mark.parametrize("recipe", ["ems", "snapkv"])
@pytest.mark.parametrize("num_requests", [1, 3])
def test_dealing_stays_within_the_workspace(recipe, num_requests):
    config = load_config({"recipe": recipe, "allocator": "ada"})
    policy = Policy.from_config(config)
    rows = [Row(4096, 9, 4000, seed=seed) for seed in range(num_requests)]
    one_layer = heads_as_rows(build_context(rows))
    one_layer = replace(
        one_layer,
        **{
            name: getattr(one_layer, name)[:1]
            for name in ("key_cache", "value_cache", "accumulated_pages", "query_ring")
        },
    )
    shape = (1, one_layer.num_rows, 1, one_layer.max_entries)
    with Allocations() as allocations:
        scores = Scores(*(torch.rand(shape) for _ in range(3)))
        config.allocator.deal(one_layer, scores, [4000] * num_requests)
    bound = policy.workspace_bytes(one_layer.num_rows * one_layer.max_entries, 1)
    assert allocations.peak <= bound - policy.scorer.scratch_bytes
