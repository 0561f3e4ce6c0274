# SPDX-License-Identifier: Apache-2.0
"""How layers share a budget: it is kept on the mean, whatever the levels and the prompt are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.layer_shares import LayerShares
from ems_vllm.policies.allocators.pyramid import PyramidAllocator
from ems_vllm.policies.levels import in_levels

RATIOS = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def fractions_of_layers(draw: st.DrawFn) -> tuple[list[float], dict[int, list[float]]]:
    """Ratios, and what each layer should keep at them: never falling, with the ratio as mean."""
    ratios, num_layers = draw(RATIOS), draw(st.integers(1, 12))
    weights = draw(st.lists(st.floats(0, 1), min_size=num_layers, max_size=num_layers))
    mean = sum(weights) / num_layers
    fractions = {}
    for layer, weight in enumerate(weights):
        # Layers stay apart as far as neither 0 nor 1 is passed, and meet at both ends.
        fractions[layer] = [ratio + (weight - mean) * min(ratio, 1 - ratio) for ratio in ratios]
    return ratios, fractions


@st.composite
def shares(draw: st.DrawFn) -> LayerShares:
    ratios, fractions = draw(fractions_of_layers())
    return in_levels(fractions, ratios, draw(st.integers(1, 5)))


def pyramids() -> st.SearchStrategy[LayerShares]:
    return st.builds(
        lambda num_layers, **options: PyramidAllocator(**options).shares(num_layers),
        st.integers(1, 40),
        beta=st.floats(1.01, 1000),
        num_levels=st.integers(1, 5),
    )


@given(shares() | pyramids(), st.integers(1, 300), st.integers(0, 300))
def test_layers_keep_the_budget_on_the_mean(shared, mean_blocks, prompt_blocks):
    blocks = shared.blocks(mean_blocks, prompt_blocks)
    assert blocks == shared.blocks(mean_blocks, prompt_blocks)
    assert len(blocks) == len(shared.levels)
    if mean_blocks >= prompt_blocks:
        assert set(blocks) == {mean_blocks}
        return
    assert all(1 <= count <= prompt_blocks for count in blocks)
    sizes = [len(level) for level in shared.levels]
    total = sum(count * size for count, size in zip(blocks, sizes, strict=True))
    # What is left would not be a block for each layer of a level.
    assert mean_blocks * shared.num_layers - max(sizes) < total <= mean_blocks * shared.num_layers


def test_worked_example():
    shared = LayerShares(levels=((0, 1), (2, 3)), ratios=(0.5,), fractions=((0.9,), (0.1,)))
    assert shared.num_layers == 4
    assert [shared.level_of(layer) for layer in range(4)] == [0, 0, 1, 1]
    with pytest.raises(KeyError):
        shared.level_of(4)
    assert shared.blocks(10, 20) == (18, 2)
    # Halfway to nothing, and halfway to everything.
    assert shared.blocks(10, 40) == (18, 2)
    assert shared.blocks(30, 40) == (38, 22)
    # A level keeps at least a block, which the other one pays for.
    assert shared.blocks(2, 100) == (3, 1)
    assert shared.blocks(50, 50) == shared.blocks(50, 7) == (50, 50)


@given(fractions_of_layers(), st.integers(1, 5))
def test_every_layer_is_in_one_level(described, num_levels):
    ratios, fractions = described
    shared = in_levels(fractions, ratios, num_levels)
    assert sorted(layer for level in shared.levels for layer in level) == sorted(fractions)
    assert len(shared.levels) == min(num_levels, len(fractions))
    sizes = [len(level) for level in shared.levels]
    assert max(sizes) - min(sizes) <= 1
    assert shared.ratios == tuple(ratios)
    for at, ratio in enumerate(ratios):
        kept = [of_level[at] for of_level in shared.fractions]
        mean = sum(f * size for f, size in zip(kept, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(ratio)
        # Levels that keep more come first.
        assert kept == pytest.approx(sorted(kept, reverse=True))


@given(st.permutations(range(6)))
def test_layers_that_keep_alike_are_put_together(order):
    fractions = {layer: [0.1 * place] for place, layer in enumerate(order)}
    shared = in_levels(fractions, [0.25], 3)
    assert [set(level) for level in shared.levels] == [
        {order[5], order[4]},
        {order[3], order[2]},
        {order[1], order[0]},
    ]


@given(st.floats(1.01, 1000), st.integers(2, 60))
def test_a_pyramid_falls_linearly_from_the_first_layer(beta, num_layers):
    shared = PyramidAllocator(beta=beta, num_levels=64).shares(num_layers)
    # One level a layer, in their order.
    assert shared.levels == tuple((layer,) for layer in range(num_layers))
    (ratio,) = shared.ratios
    kept = [fraction for (fraction,) in shared.fractions]
    assert sum(kept) / num_layers == pytest.approx(ratio, abs=1e-3)
    assert kept[0] == max(kept) <= 1
    assert kept[-1] == pytest.approx(ratio / beta, rel=1e-3)
    steps = [above - below for above, below in pairwise(kept)]
    assert steps == pytest.approx([steps[0]] * len(steps), abs=1e-6)


def test_a_pyramid_of_one_layer_is_the_budget():
    assert PyramidAllocator().shares(1).blocks(3, 10) == (3,)
