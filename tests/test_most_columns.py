# SPDX-License-Identifier: Apache-2.0
"""What vLLM is told that a request takes at most, where prompts are compacted as they come."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm.layer_shares import LayerShares
from ems_vllm.plan import PlanSettings


@dataclass(frozen=True)
class Asked:
    """What a request asks for; more than the server allows is cut."""

    budget: int | None = None
    ratio: float | None = None
    enabled: bool = True


RATIOS = st.floats(0.01, 1.0)


@st.composite
def layer_shares(draw: st.DrawFn) -> LayerShares:
    """Two levels of two layers, one of which keeps more."""
    less = draw(st.floats(0.02, 0.5))
    return LayerShares(((0, 1), (2, 3)), ratios=(0.5,), fractions=((1.0 - less,), (less,)))


@st.composite
def plan_settings(draw: st.DrawFn) -> PlanSettings:
    is_ratio = draw(st.booleans())
    return PlanSettings(
        budget=None if is_ratio else draw(st.integers(1, 120)),
        ratio=draw(RATIOS) if is_ratio else None,
        recent_window=draw(st.integers(0, 40)),
        recompress_interval=draw(st.sampled_from([0, 7, 16, 50])),
        min_blocks_saved=draw(st.integers(1, 4)),
        allow_off=False,
        max_budget=draw(st.none() | st.integers(1, 160)),
        prefill_interval=draw(st.integers(1, 60)),
        shares=draw(st.none() | layer_shares()),
        level=0,
    )


@settings(max_examples=200)
@given(plan_settings(), st.sampled_from([1, 4, 16]), st.integers(20, 120), st.data())
def test_no_request_of_any_length_takes_more(plan_settings, block_size, max_model_len, data):
    asked = data.draw(
        st.lists(
            st.one_of(
                st.just(Asked()),
                st.builds(Asked, budget=st.integers(1, 400)),
                st.builds(Asked, ratio=RATIOS),
                st.just(Asked(enabled=False)),
            ),
            min_size=1,
            max_size=3,
        )
    )
    for _, of_level in plan_settings.levels():
        most = of_level.most_columns(block_size, max_model_len)
        taken = [
            of_level.plan(prompt_len, block_size, request).max_replay_columns(max_model_len)
            for request in asked
            for prompt_len in range(1, max_model_len)
        ]
        assert max(taken) <= most


def test_a_length_that_fills_no_block_may_take_a_block_more():
    """Than those that do, of which the bound is made; it allows for that, and for no more."""
    plan_settings = PlanSettings(
        budget=None,
        ratio=0.1,
        recent_window=2,
        recompress_interval=7,
        min_blocks_saved=1,
        allow_off=False,
        prefill_interval=3,
    )
    taken = plan_settings.plan(9, 4, Asked()).max_replay_columns(40)
    assert plan_settings.most_columns(4, 40) == taken
