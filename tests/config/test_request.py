# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for."""

import re
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.config.request import KEYS

BUDGET = load_config({"recipe": "ems", "budget": 256}).plan_settings
RATIO = load_config({"recipe": "ems", "ratio": 0.25}).plan_settings
RAISED = load_config({"recipe": "ems", "budget": 256, "max_budget": 512}).plan_settings
RAISED_RATIO = load_config({"recipe": "ems", "ratio": 0.25, "max_budget": 512}).plan_settings
NO_OFF = load_config({"recipe": "ems", "budget": 256, "allow_off": False}).plan_settings
OFF = RequestOptions(enabled=False)


def test_nothing_asked_means_the_servers_settings():
    assert RequestOptions.parse(None) == RequestOptions.parse({"other": 1}) == RequestOptions()


@pytest.mark.parametrize(
    ("extra_args", "parts"),
    [
        ({"kv_bugdet": 5}, ["kv_bugdet=5", "use 'kv_budget'"]),
        ({"kv-budget": 5}, ["kv-budget=5", "use 'kv_budget'"]),
        ({"KV_Ratio": 0.5}, ["KV_Ratio=0.5", "use 'kv_ratio'"]),
        ({"kv_compress": "off"}, ["kv_compress='off'", "use 'kv_compression'"]),
        ({"kv_compression": "ems"}, ["kv_compression='ems'", "'on' or 'off'"]),
        ({"kv_budget": 0}, ["kv_budget=0", "at least 1"]),
        ({"kv_budget": 1.5}, ["kv_budget=1.5"]),
        ({"kv_budget": True}, ["kv_budget=True"]),
        ({"kv_budget": "64"}, ["kv_budget='64'"]),
        ({"kv_ratio": 1}, ["kv_ratio=1", "between 0 and 1"]),
        ({"kv_ratio": float("nan")}, ["kv_ratio=nan"]),
        ({"kv_budget": 5, "kv_ratio": 0.5}, ["kv_budget=5", "kv_ratio=0.5", "one of them"]),
        ({"kv_compression": "off", "kv_budget": 5}, ["kv_budget=5", "no effect"]),
        ({"kv_compression": "off", "kv_protect": "0-5"}, ["kv_protect='0-5'", "no effect"]),
        ({"kv_protct": "0-5"}, ["kv_protct='0-5'", "use 'kv_protect'"]),
        ({"kv_protect": 5}, ["kv_protect=5", "a list of ranges"]),
        ({"kv_protect": [0, 128]}, ["kv_protect=[0, 128]", "such as '0-128'"]),
        ({"kv_protect": ["0-5", "users"]}, ["'users' is neither", "system, last_user, tools"]),
        ({"kv_protect": "0:5"}, ["'0:5' is neither a range nor a role"]),
        ({"kv_protect": ""}, ["'' is neither a range nor a role"]),
        ({"kv_protect": "-5-9"}, ["'-5-9' is neither"]),
        ({"kv_protect": "none,0-5"}, ["'none' is neither"]),
        ({"kv_protect": ["7-7"]}, ["'7-7' holds no token", "the one behind the last"]),
        ({"kv_protect": ["9-7"]}, ["'9-7' holds no token"]),
        # Digits of other scripts, which int() would take.
        ({"kv_protect": ["\u0660-\u0663"]}, ["is neither a range nor a role"]),
        ({"kv_protect": ["0-1"] * 1025}, ["1025 ranges and roles", "at most 1024"]),
        ({"kv_protect": ",".join(["0-1"] * 1025)}, ["1025 ranges and roles", "at most 1024"]),
        ({f"mine_{at}": 1 for at in range(257)}, ["257 keys", "at most 256"]),
    ],
)
def test_mistake_is_answered(extra_args, parts):
    with pytest.raises(ConfigError) as error:
        RequestOptions.parse(extra_args)
    for part in parts:
        assert part in str(error.value)


NESTED = reduce(lambda inner, _: [inner], range(5000), 1)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x" * 10**6], ["x"] * 10**6, NESTED, {"a": NESTED}, -(10**5000), [10**5000]],
    ids=["text", "text in a list", "list", "deep", "deep object", "digits", "digits in a list"],
)
def test_what_is_refused_is_shown_in_short(key, value):
    with pytest.raises(ConfigError) as error:
        RequestOptions.parse({key: value})
    assert f"vllm_xargs.{key}=" in str(error.value)
    assert len(str(error.value)) < 1000


def test_keys_that_vllm_reads_are_left_alone():
    """Gateways send some of them with every request; none looks like a typing error of ours."""
    read = re.compile(r"""extra(?:_args)?(?:\.get\(\s*|\[)["'](\w+)["']""")
    root = Path(find_spec("vllm").origin).parent
    texts = (path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    found = {key for text in texts if "extra_args" in text for key in read.findall(text)}
    assert found >= {"kv_cache_report_mode", "kv_transfer_params", "ec_transfer_params"}
    assert RequestOptions.parse(dict.fromkeys(found - set(KEYS), "full")) == RequestOptions()


def test_unchecked_request_is_served_with_the_servers_settings():
    assert RequestOptions.parse_admitted({"kv_budget": -1}) == RequestOptions()
    assert RequestOptions.parse_admitted({"kv_budget": 9}) == RequestOptions(
        budget=9, is_asked_for=True
    )


def test_the_servers_size_is_the_ceiling():
    RequestOptions(budget=256).check_ceiling(BUDGET)
    with pytest.raises(ConfigError, match=r"kv_budget=257 .* at most 256"):
        RequestOptions(budget=257).check_ceiling(BUDGET)
    with pytest.raises(ConfigError, match=r"kv_ratio=0.5 .* at most 0.25"):
        RequestOptions(ratio=0.5).check_ceiling(RATIO)


def test_the_server_may_let_requests_ask_for_more():
    RequestOptions(budget=512).check_ceiling(RAISED)
    RequestOptions(budget=512).check_ceiling(RAISED_RATIO)
    RequestOptions(ratio=0.5).check_ceiling(RAISED_RATIO)
    for settings in (RAISED, RAISED_RATIO):
        with pytest.raises(ConfigError, match=r"kv_budget=513 .* at most 512"):
            RequestOptions(budget=513).check_ceiling(settings)


def test_the_server_may_forbid_to_switch_off():
    OFF.check_ceiling(BUDGET)
    with pytest.raises(ConfigError, match=r"kv_compression='off' is not allowed on this server"):
        OFF.check_ceiling(NO_OFF)
    with pytest.raises(ConfigError, match=r"at most 256 entries; send at most that\."):
        RequestOptions(budget=257).check_ceiling(NO_OFF)


def test_a_ceiling_below_the_servers_size_is_a_mistake():
    with pytest.raises(ConfigError, match=r"max_budget=255 .* at least budget=256"):
        load_config({"recipe": "ems", "budget": 256, "max_budget": 255})


@pytest.mark.parametrize(
    ("settings", "options", "prompt_len", "blocks"),
    [
        (BUDGET, RequestOptions(), 4000, 16),
        (BUDGET, RequestOptions(budget=100), 4000, 7),
        (BUDGET, RequestOptions(ratio=0.5), 4000, 16),
        (BUDGET, RequestOptions(ratio=0.01), 4000, 3),
        (BUDGET, OFF, 4000, 0),
        # From a front end that has not refused it.
        (NO_OFF, OFF, 4000, 16),
        (RAISED, RequestOptions(), 4000, 16),
        (RAISED, RequestOptions(budget=400), 4000, 25),
        (RAISED, RequestOptions(budget=100_000), 4000, 32),
        (RAISED, RequestOptions(ratio=0.5), 4000, 32),
        (RAISED_RATIO, RequestOptions(), 1000, 16),
        (RAISED_RATIO, RequestOptions(ratio=0.4), 1000, 25),
        (RAISED_RATIO, RequestOptions(ratio=0.9), 1000, 32),
        # Asking for the server's own size never gives less.
        (RAISED_RATIO, RequestOptions(), 4000, 63),
        (RAISED_RATIO, RequestOptions(ratio=0.25), 4000, 63),
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
