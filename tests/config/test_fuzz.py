# SPDX-License-Identifier: Apache-2.0
"""Whatever an operator types: settings that work, or one sentence that names what is wrong."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ems_vllm.config import (
    ConfigError,
    KVCompressionConfig,
    RequestOptions,
    load_config,
    parse_overrides,
    recipes,
)

FIELDS = sorted(KVCompressionConfig.model_fields)
OPTIONS = ["name", "num_sink_tokens", "similarity_threshold", "relevant_mass", "kernel_size"]
OPTIONS += ["profile", "uniform_share", "num_levels", "beta", "ratios", "fractions"]
COMPONENTS = ["ems", "snapkv", "h2o", "knorm", "top_k", "uniform", "pyramid", "profile", "none"]
ALLOCATORS = [
    "pyramid",
    {"name": "profile", "profile": {"ratios": [0.5], "fractions": {0: [0.25], 1: [0.75]}}},
]
PROMPT_LENS = (1, 500, 100_000)

numbers = (
    st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, 10**30, -(2**63), 1e308, 5e-324, 0.5])
    | st.floats()
)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | st.sampled_from([*COMPONENTS, "off", "on", "12", "nan", "inf", "\n", "\ud800", "\0"])
    | st.text(max_size=8)
)
# A YAML mapping may have keys that are no strings.
keys = st.sampled_from([*FIELDS, *OPTIONS, "bugdet", "", "a\nb"]) | st.text(max_size=5)
yaml_keys = keys | st.none() | st.booleans() | st.integers() | st.dates()


def mappings(key: st.SearchStrategy[Any], max_size: int = 4) -> st.SearchStrategy[Any]:
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(key, inner, max_size=3),
        max_leaves=6,
    )
    return st.dictionaries(key, values, max_size=max_size)


# Near enough to what is right that many are accepted.
plausible = st.fixed_dictionaries(
    {},
    optional={
        "recipe": st.sampled_from([*recipes.names(), "off", "x", ""]),
        "budget": numbers | st.none(),
        "ratio": numbers | st.none(),
        "recent_window": numbers,
        "obs_window": st.integers(-1, 70),
        "recompress_interval": numbers,
        "min_blocks_saved": numbers,
        "global_queries": st.sampled_from(["all", 1, 2.5, "some", 0, 2**31]) | numbers,
        "sample_stride": numbers,
        "prefix_score_tokens": numbers | st.none(),
        "query_ring_rows": numbers | st.none(),
        "workspace_mib": numbers,
        "scorer": st.sampled_from(COMPONENTS) | mappings(st.sampled_from(OPTIONS), 2),
        "allocator": st.sampled_from(ALLOCATORS) | mappings(st.sampled_from(OPTIONS), 2),
        "selector": st.fixed_dictionaries({}, optional={"num_sink_tokens": numbers}),
        "merger": st.sampled_from(COMPONENTS) | mappings(st.sampled_from(OPTIONS), 2),
    },
)


def verdict(read: Callable[[], Any]) -> Any:
    """What `read` gives; None when it refuses with one sentence that begins with the key."""
    try:
        return read()
    except ConfigError as refusal:
        message = str(refusal)
        assert message.startswith("kv_compression"), message
        assert message.endswith("."), message
        assert message.isprintable(), message
        return None


def assert_works(config: KVCompressionConfig | None) -> None:
    """Every process of a server reads the same settings, and can plan with them."""
    if config is None:
        return
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config
    for prompt_len in PROMPT_LENS:
        for _, settings in config.plan_settings_of(4).levels():
            settings.plan(prompt_len, 16, RequestOptions())


def check_settings(settings: Any) -> None:
    assert_works(verdict(lambda: load_config(settings)))


def check_text(text: str) -> None:
    overrides = verdict(lambda: parse_overrides(text))
    if overrides is not None:
        check_settings({"recipe": "ems", **overrides})


@given(plausible | mappings(yaml_keys))
@example({"budget": 10**30})
@example({"ratio": 0.5, "selector": {"num_sink_tokens": 2**63}})
@example({"scorer": {"name": ["ems"]}})
@example({5: 1})
@example({"selector": {5: 1}})
@example({"a\nb": 1})
def test_settings(settings: dict[Any, Any]) -> None:
    check_settings(settings)


def test_plausible_settings_are_accepted_often_enough_to_prove_something() -> None:
    accepted = []

    @given(plausible)
    def count(settings: dict[str, Any]) -> None:
        accepted.append(verdict(lambda: load_config(settings)) is not None)

    count()
    assert 0.03 < sum(accepted) / len(accepted) < 0.9


@given(scalars | st.lists(scalars, max_size=2))
@example("x\0.yaml")
@example("\ud800.yaml")
@example("a" * 5000 + ".yaml")
def test_recipe(recipe: Any) -> None:
    check_settings(recipe)
    check_settings({"recipe": recipe})


@given(st.text() | st.text(alphabet='{}[]":,0.eE-nulltruefasbdgt ').map("{".__add__))
@example('{"budget": ' + "9" * 5000 + "}")
@example('{"a":' * 100_000)
@example('{"a": NaN}')
@example("x\0y")
@example("\ud800")
@example("/")
def test_text_on_the_command_line(text: str) -> None:
    check_text(text)


@given(mappings(keys).map(json.dumps), st.data())
def test_broken_json(text: str, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 3)))
    check_text(text[:begin] + data.draw(st.text(max_size=2)) + text[end:])


@given(
    st.binary(max_size=60)
    | st.text(alphabet="{}[]&*!|>%@-: \n\tabudget0123.", max_size=60).map(str.encode)
    | mappings(yaml_keys).map(lambda data: yaml.safe_dump(data, allow_unicode=True).encode())
)
@example(b"\xff\xfe\xff")
@example(b"when: 2001-99-99")
@example(b"[" * 1200)
@example(b"recipe: 'off'")
@example(b"&a {budget: *a}")
@example(b"- budget")
def test_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.yaml")
        path.write_bytes(content)
        check_text(str(path))
        check_settings(str(path))


def test_file_may_not_be_called_off(tmp_path: Path) -> None:
    """Its name would switch compression off in the processes that are told the settings."""
    path = tmp_path / "off.yaml"
    path.write_text("scorer: knorm\nbudget: 64\nallocator: uniform\nselector: top_k\nmerger: none")
    with pytest.raises(ConfigError, match="kv_compression"):
        load_config(str(path))
