# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import ConfigError, RequestOptions, load_config

BUDGET = load_config({"recipe": "ems", "budget": 256}).plan_settings
RATIO = load_config({"recipe": "ems", "ratio": 0.25}).plan_settings


def test_nothing_asked_means_the_servers_settings():
    assert RequestOptions.parse(None) == RequestOptions.parse({"other": 1}) == RequestOptions()


@pytest.mark.parametrize(
    ("extra_args", "parts"),
    [
        ({"kv_bugdet": 5}, ["kv_bugdet=5", "kv_budget"]),
        ({"kv_compression": "ems"}, ["kv_compression='ems'", "'on' or 'off'"]),
        ({"kv_budget": 0}, ["kv_budget=0", "at least 1"]),
        ({"kv_budget": 1.5}, ["kv_budget=1.5"]),
        ({"kv_budget": True}, ["kv_budget=True"]),
        ({"kv_budget": "64"}, ["kv_budget='64'"]),
        ({"kv_ratio": 1}, ["kv_ratio=1", "between 0 and 1"]),
        ({"kv_ratio": float("nan")}, ["kv_ratio=nan"]),
        ({"kv_budget": 5, "kv_ratio": 0.5}, ["kv_budget=5", "kv_ratio=0.5", "one of them"]),
        ({"kv_compression": "off", "kv_budget": 5}, ["kv_budget=5", "no effect"]),
    ],
)
def test_mistake_is_answered(extra_args, parts):
    with pytest.raises(ConfigError) as error:
        RequestOptions.parse(extra_args)
    for part in parts:
        assert part in str(error.value)


def test_unchecked_request_is_served_with_the_servers_settings():
    assert RequestOptions.parse_admitted({"kv_budget": -1}) == RequestOptions()
    assert RequestOptions.parse_admitted({"kv_budget": 9}) == RequestOptions(budget=9)


def test_the_servers_size_is_the_ceiling():
    RequestOptions(budget=256).check_ceiling(BUDGET)
    with pytest.raises(ConfigError, match=r"kv_budget=257 .* at most 256"):
        RequestOptions(budget=257).check_ceiling(BUDGET)
    with pytest.raises(ConfigError, match=r"kv_ratio=0.5 .* at most 0.25"):
        RequestOptions(ratio=0.5).check_ceiling(RATIO)


@pytest.mark.parametrize(
    ("settings", "options", "prompt_len", "blocks"),
    [
        (BUDGET, RequestOptions(), 4000, 16),
        (BUDGET, RequestOptions(budget=100), 4000, 7),
        (BUDGET, RequestOptions(ratio=0.5), 4000, 16),
        (BUDGET, RequestOptions(ratio=0.01), 4000, 3),
        (BUDGET, RequestOptions(enabled=False), 4000, 0),
        (RATIO, RequestOptions(), 4000, 63),
        (RATIO, RequestOptions(budget=64), 4000, 4),
        (RATIO, RequestOptions(budget=100_000), 4000, 63),
    ],
)
def test_budget_in_whole_blocks(settings, options, prompt_len, blocks):
    assert settings.plan(prompt_len, 16, options).budget_blocks == blocks


@given(
    st.dictionaries(
        st.sampled_from(["kv_compression", "kv_budget", "kv_ratio", "kv_x", "seed"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    )
)
def test_anything_is_accepted_or_refused_with_a_sentence(extra_args):
    try:
        options = RequestOptions.parse(extra_args)
        options.check_ceiling(BUDGET)
    except ConfigError as refusal:
        message = str(refusal)
    else:
        message = None
        assert options.budget is None or 1 <= options.budget <= 256
    assert message is None or message.endswith(".")
