# SPDX-License-Identifier: Apache-2.0
"""What a server is asked for gives what was stated, by the plan that the server follows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.eval.records.budget import Budget, kv_budget, largest_kv_budget, smallest_total
from ems_vllm.eval.server.measure import blocks_held
from ems_vllm.plan import PlanSettings


def held(budget: int, prompt_len: int, window: int, block_size: int, ceiling: int) -> int:
    """Entries per kv_head once the prompt is processed, by the plan."""
    settings = PlanSettings(
        budget=ceiling,
        ratio=None,
        recent_window=window,
        recompress_interval=256,
        min_blocks_saved=1,
    )
    plan = settings.plan(prompt_len, block_size, RequestOptions(budget=budget))
    return prompt_len - plan.columns(prompt_len)[0] * block_size


@given(
    prompt_len=st.integers(1, 9000),
    total=st.integers(1, 9000),
    window=st.integers(1, 100),
    block_size=st.sampled_from([8, 16, 32]),
)
def test_a_request_holds_at_most_the_total_and_less_than_a_block_fewer(
    prompt_len, total, window, block_size
):
    budget = kv_budget(total, prompt_len, window, block_size)
    if budget is None:
        assert total < smallest_total(window, block_size)
        return
    ceiling = largest_kv_budget(total, window, block_size)
    assert budget <= ceiling
    entries = held(budget, prompt_len, window, block_size, ceiling)
    assert entries <= total
    assert entries > min(total, prompt_len) - block_size


def test_by_hand():
    # (4000 - 16) // 16 = 249 whole blocks, so the last 16 tokens are the tail; 82 - 16 = 66.
    assert kv_budget(82, prompt_len=4000, recent_window=16, block_size=16) == 64
    # One token more makes the tail 17 long and leaves 65; fifteen more make it 31 and leave 51.
    assert kv_budget(82, prompt_len=4001, recent_window=16, block_size=16) == 64
    assert kv_budget(82, prompt_len=4015, recent_window=16, block_size=16) == 48
    assert kv_budget(40, prompt_len=4015, recent_window=16, block_size=16) is None


@pytest.mark.parametrize(
    ("text", "total"),
    [("256", 256), ("0.02", 81), ("0.5", 2048), (0.07, 286), ("full", None), (32.0, 32)],
)
def test_total_of_a_budget(text, total):
    assert Budget.parse(text).total(4096) == total


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "nan", "inf", "", None])
def test_no_budget(text):
    with pytest.raises(ConfigError, match=r"^budgets=.* is not a budget: give entries .*\.$"):
        Budget.parse(text)


@pytest.mark.parametrize("budget", [64, 256, 4096])
def test_blocks_held_are_the_mean_of_layers_that_share_a_budget_unequally(budget):
    config = load_config({"recipe": "ems", "budget": 4096, "allocator": "pyramid"})
    request = RequestOptions(budget=budget)
    by_level = [
        (num_layers, settings.plan(2000, 16, request).columns(2000)[0])
        for num_layers, settings in config.plan_settings_of(30).levels()
    ]
    assert len({freed for _, freed in by_level}) == (1 if budget == 4096 else 3)
    held = sum(num_layers * (126 - freed) for num_layers, freed in by_level) / 30
    # Rounding down to whole blocks may leave a level of ten layers one block less.
    assert blocks_held(config, 2000, budget, 16) - 10 / 30 < held
    assert held <= blocks_held(config, 2000, budget, 16)
