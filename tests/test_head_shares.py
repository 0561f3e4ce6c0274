# SPDX-License-Identifier: Apache-2.0
"""How kv_heads share the pages of a layer: all are dealt, whatever the budget and the prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.head_shares import HeadShares

RATIOS = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def shares(draw: st.DrawFn) -> HeadShares:
    """Any heads; a layer as a whole may keep more or less than the model at a ratio."""
    ratios = draw(RATIOS)
    rows = st.lists(st.floats(0, 1), min_size=len(ratios), max_size=len(ratios)).map(sorted)
    heads = draw(st.lists(rows, min_size=1, max_size=8))
    return HeadShares(tuple(ratios), tuple(map(tuple, heads)))


@given(shares(), st.integers(1, 300), st.integers(0, 300))
def test_as_many_pages_as_equal_shares(shared, budget_blocks, prompt_blocks):
    pages = shared.pages(budget_blocks, prompt_blocks)
    assert pages == shared.pages(budget_blocks, prompt_blocks)
    assert sum(pages) == budget_blocks * shared.num_heads
    if budget_blocks >= prompt_blocks:
        assert set(pages) == {budget_blocks}
    else:
        assert all(1 <= count <= prompt_blocks for count in pages)


@given(st.integers(1, 8), RATIOS, st.integers(1, 300), st.integers(0, 300))
def test_equal_heads_have_equal_pages(num_heads, ratios, budget_blocks, prompt_blocks):
    shared = HeadShares(tuple(ratios), (tuple(ratios),) * num_heads)
    assert shared.pages(budget_blocks, prompt_blocks) == (budget_blocks,) * num_heads


def test_worked_example():
    shared = HeadShares(ratios=(0.25, 0.5), fractions=((0.4, 0.9), (0.0, 0.1)))
    # The layer keeps 0.2 of a prompt at a quarter, and a half at a half.
    assert shared.pages(20, 100) == (39, 1)
    assert shared.pages(50, 100) == (90, 10)
    # Halfway from the one to the other, and from nothing to the first.
    assert shared.pages(35, 100) == (65, 5)
    assert shared.pages(10, 100) == (19, 1)
    assert shared.pages(75, 100) == (95, 55)
    assert shared.pages(7, 7) == (7, 7)
    # What heads must keep comes first.
    assert shared.pages(20, 100, 8) == (32, 8)
    assert shared.pages(20, 100, 20) == (20, 20)
    # Ranks deal among their own heads.
    assert shared.of_heads(1, 2).pages(20, 100) == (20,)


@pytest.mark.parametrize("fractions", [((0.0,), (0.0,)), ((1.0,), (1.0,))])
def test_heads_that_need_nothing_or_everything_share_what_there_is(fractions):
    pages = HeadShares((0.5,), fractions).pages(10, 40)
    assert sum(pages) == 20
    assert max(pages) - min(pages) <= 1
