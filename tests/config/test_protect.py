# SPDX-License-Identifier: Apache-2.0
"""What a request may protect, and whether there is room for it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.config.protect import Protect
from ems_vllm.spans import merged, num_covered

SETTINGS = {"recipe": "ems", "budget": 64, "recent_window": 32, "recompress_interval": 32}
NUM_SINKS = 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", Protect()),
        ([], Protect()),
        ("0-128", Protect(((0, 128),))),
        (["0-128"], Protect(((0, 128),))),
        ("system, 5-9 ,2-3", Protect(((2, 3), (5, 9)), ("system",))),
        (["last_user", "tools", "system", "tools"], Protect((), ("system", "last_user", "tools"))),
        (["4-9", "0-4", "8-12"], Protect(((0, 12),))),
    ],
)
def test_ranges_and_roles(value, expected):
    assert RequestOptions.parse({"kv_protect": value}).protect == expected
    assert Protect.parse(expected.sent()) == expected
    assert bool(expected) == (value not in ("none", []))


def test_nothing_said_is_not_nothing_protected():
    assert RequestOptions.parse({}).protect is None
    assert (
        RequestOptions.parse({"kv_compression": "off", "kv_protect": "none"}).protect == Protect()
    )


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.integers(0, 45))
def test_spans_cover_what_they_cover(spans, end):
    covered = {p for start, stop in spans for p in range(start, stop)}
    found = merged(spans)
    assert {p for start, stop in found for p in range(start, stop)} == covered
    assert list(found) == sorted(found)
    assert all(one[1] < other[0] for one, other in pairwise(found))
    assert num_covered(spans, end) == len([p for p in covered if p < end])


def check(value, prompt_len=400, max_tokens=500, settings=None, **options):
    config = load_config({**SETTINGS, **(settings or {})})
    request = RequestOptions.parse({"kv_protect": value, **options})
    plans = [
        level.plan(prompt_len, 16, request) for _, level in config.plan_settings_of(4).levels()
    ]
    assert request.protect is not None
    request.protect.check(prompt_len, prompt_len + max_tokens, plans, NUM_SINKS)


@pytest.mark.parametrize(
    ("value", "options", "parts"),
    [
        ("0-401", {}, ["kv_protect=['0-401']", "prompt has 400 tokens", "positions of the prompt"]),
        (
            "100-161",
            {},
            ["covers 61 tokens", "with 4 sinks makes 65, and 64 entries", "kv_protect='none'"],
        ),
        ("0-65", {}, ["covers 65 tokens", "makes 65, and 64 entries are kept"]),
        ("100-129", {"kv_budget": 32}, ["covers 29", "makes 33, and 32 entries"]),
        # They come out of the recent window while an answer is generated.
        ("330-400", {}, ["covers 70 tokens of what is compressed, which with 4 sinks makes 74"]),
        ("330-400", {"max_tokens": 100}, ["makes 74"]),
        ("10-40", {"settings": {"allocator": "pyramid"}}, ["makes 34, and 16 entries are kept"]),
        ("0-5, system", {}, ["system can be found in chat completions only"]),
        ("last_user,tools", {}, ["last_user, tools can be found in chat completions only"]),
    ],
)
def test_what_has_no_room_is_refused_with_the_numbers(value, options, parts):
    with pytest.raises(ConfigError) as error:
        check(value, **options)
    for part in parts:
        assert part in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("100-160", {}),
        ("0-64", {}),
        # Never compressed, or not while it generates so little.
        ("0-90", {"prompt_len": 90, "max_tokens": 20}),
        ("330-400", {"max_tokens": 20}),
        ("330-400", {"settings": {"recompress_interval": 0}}),
        ("100-160", {"settings": {"max_budget": 64}}),
        ("10-20", {"settings": {"allocator": "pyramid"}}),
        ("none", {}),
    ],
)
def test_what_has_room_passes(value, options):
    check(value, **options)


def test_a_server_protects_roles_only():
    assert load_config({**SETTINGS, "protect": ["system", "tools"]}).protect == ("system", "tools")
    for wrong in ("0-128", "users"):
        with pytest.raises(ConfigError, match=rf"protect\.0='{wrong}' is not allowed"):
            load_config({**SETTINGS, "protect": [wrong]})


def test_settings_with_roles_survive_the_way_to_other_processes():
    config = load_config({**SETTINGS, "protect": ["system"]})
    assert config.to_dict()["protect"] == ["system"]
    assert load_config(config.to_dict()) == config
