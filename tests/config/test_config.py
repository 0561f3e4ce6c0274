# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted, and that every mistake is answered with key, value and remedy."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import (
    ConfigError,
    KVCompressionConfig,
    load_config,
    parse_overrides,
    profiles,
    recipes,
)
from ems_vllm.policies.coverage import Coverage


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_survives_a_round_trip_through_json(name):
    config = load_config(name)
    assert config.recipe == name
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("value", [None, "off", {"recipe": "off"}])
def test_off(value):
    assert load_config(value) is None


def test_overrides_win_and_keep_the_rest_of_a_component():
    config = load_config({"recipe": "ems", "budget": 512, "merger": {"similarity_threshold": 0.8}})
    assert config.budget == 512
    assert config.merger.name() == "ems"
    assert config.merger.similarity_threshold == 0.8
    assert config.merger.relevant_mass == load_config("ems").merger.relevant_mass


def test_another_component_replaces_the_recipes():
    config = load_config({"recipe": "snapkv", "merger": {"name": "ems"}})
    assert config.scorer.name() == "snapkv"
    assert config.merger.name() == "ems"


def test_ratio_replaces_the_recipes_budget():
    config = load_config({"recipe": "ems", "ratio": 0.1})
    assert config.budget is None
    assert config.ratio == 0.1


def test_file_is_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "budget: 128\nscorer: knorm\nallocator: uniform\nselector: top_k\nmerger: none\n"
    )
    config = load_config(str(path))
    assert config.recipe == "mine"
    assert config.scorer.name() == "knorm"
    assert parse_overrides(str(path))["budget"] == 128


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("emss", ["'emss'", "ems"]),
        ("/no/such/file.yaml", ["/no/such/file.yaml", "cannot be read"]),
        (7, ["kv_compression=7"]),
        ({"recipe": "ems", "bugdet": 1}, ["bugdet=1", "use 'budget'"]),
        ({"recipe": "ems", "budget": 0}, ["budget=0", "greater than or equal to 1"]),
        ({"recipe": "ems", "budget": "many"}, ["budget='many'"]),
        ({"recipe": "ems", "ratio": 1.5}, ["ratio=1.5", "less than 1"]),
        ({"recipe": "ems", "budget": 64, "ratio": 0.5}, ["budget=64", "ratio=0.5", "exactly one"]),
        ({"recipe": "ems", "budget": None}, ["budget=None", "exactly one"]),
        ({"recipe": "ems", "obs_window": 65}, ["obs_window=65", "recent_window=64"]),
        ({"recipe": "ems", "scorer": "emz"}, ["scorer", "'emz'", "did you mean 'ems'"]),
        ({"recipe": "ems", "scorer": 3}, ["scorer=3", "snapkv"]),
        (
            {"recipe": "ems", "merger": {"name": "ems", "treshold": 1}},
            ["merger.treshold=1", "similarity_threshold"],
        ),
        (
            {"recipe": "ems", "merger": {"similarity_threshold": 2}},
            ["merger.similarity_threshold=2", "less than or equal to 1"],
        ),
        ({"recipe": "snapkv", "scorer": {"kernel_size": 4}}, ["kernel_size=4", "use 3 or 5"]),
        (
            {"recipe": "ems", "budget": 8, "selector": {"num_sink_tokens": 9}},
            ["num_sink_tokens=9", "budget=8"],
        ),
        (
            {"recipe": "h2o", "global_queries": 3, "sample_stride": 4},
            ["sample_stride=4", "global_queries=3", "lower it"],
        ),
        ({"recipe": "ems", "coverage": 1.0}, ["coverage=1.0", "less than 1"]),
        ({"recipe": "ems", "coverage": 0}, ["coverage=0", "greater than 0"]),
        ({"recipe": "ems", "min_budget": 8}, ["min_budget=8", "set one, or leave min_budget out"]),
        (
            {"recipe": "ems", "budget": 256, "coverage": 0.9, "min_budget": 512},
            ["min_budget=512", "at most budget=256", "lower it or raise budget"],
        ),
        (
            {"recipe": "ems", "coverage": 0.9, "allocator": "ada"},
            ["coverage=0.9", "allocator='ada'", "leave it out"],
        ),
        ({"recipe": "ems", "guard_share": 1.5}, ["guard_share=1.5", "less than or equal to 1"]),
        ({"recipe": "ems", "guard_limit": 0.2}, ["guard_limit=0.2", "guard_share=0", "leave"]),
        (
            {"recipe": "ems", "guard_action": "dense"},
            ["guard_action='dense'", "guard_share=0", "leave guard_action out"],
        ),
        (
            {"recipe": "keydiff", "guard_share": 0.1},
            ["guard_share=0.1", "scorer='keydiff'", "records no queries", "set it to 0"],
        ),
        (
            {"recipe": "ems", "guard_share": 0.1, "guard_tolerance": 0.1},
            ["guard_tolerance=0.1", 'guard_action="report"', "leave guard_tolerance out"],
        ),
        (
            {"recipe": "ems", "guard_share": 0.1, "guard_action": "dense"},
            ['guard_action="dense"', "guard_limit", "set one"],
        ),
        (
            {"recipe": "ems", "guard_share": 1, "guard_limit": 1, "guard_action": "dense"},
            ["guard_share=1.0", 'guard_action="dense"', "lower it"],
        ),
        (
            {
                "recipe": "ems",
                "guard_share": 0.1,
                "guard_limit": 0.2,
                "guard_action": "dense",
                "allow_off": False,
            },
            ['guard_action="dense"', "allow_off=False", "set allow_off to true"],
        ),
        ({"recipe": "off", "budget": 8}, ["'budget': 8", "compression is off"]),
    ],
)
def test_mistake_is_answered_with_key_value_and_remedy(value, parts):
    with pytest.raises(ConfigError) as error:
        load_config(value)
    message = str(error.value)
    for part in parts:
        assert part in message, message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(("min_budget", "least"), [(None, 64), (16, 16)])
def test_a_coverage_keeps_some_entries_in_any_case(min_budget, least):
    config = load_config({"recipe": "ems", "coverage": 0.9, "min_budget": min_budget})
    assert config.covered == Coverage(0.9, least)
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config
    assert load_config("ems").covered is None


PROFILE = {"ratios": [0.25, 0.5], "fractions": {0: [0.4, 0.6], 1: [0.1, 0.4]}}
_FILE = "the path of a .yaml file that `ems-vllm calibrate` wrote."
_CHOICES = f"{', '.join(profiles.names())}, or {_FILE}"


def with_profile(profile, **options):
    return {"recipe": "ems", "allocator": {"name": "profile", "profile": profile, **options}}


def test_a_profile_is_read_from_a_file_and_travels_with_the_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": "mine", **PROFILE}))
    config = load_config(with_profile(str(path), uniform_share=0.5, num_levels=2))
    assert config.allocator.profile.model == "mine"
    path.unlink()
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config
    assert config.plan_settings_of(2).shares.levels == ((0,), (1,))
    assert config.plan_settings.shares is None


@pytest.mark.parametrize("name", profiles.names())
def test_a_profile_that_ships_is_found_by_its_name(name):
    config = load_config(with_profile(name, num_levels=3))
    fractions = config.allocator.profile.fractions
    shares = config.plan_settings_of(len(fractions)).shares
    assert sorted(sum(shares.levels, ())) == sorted(fractions)


def test_where_no_profile_ships_a_name_is_answered(monkeypatch, tmp_path):
    monkeypatch.setattr(profiles, "_folder", lambda: tmp_path / "profiles")
    with pytest.raises(ConfigError, match=f"='smol' is not a profile: give {_FILE}"):
        load_config(with_profile("smol"))


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        ("smol", f"='smol' is not a profile: give {_CHOICES}"),
        (
            "/no/such.yaml",
            "='/no/such.yaml' cannot be read (No such file or directory): give the path of a YAML "
            "file.",
        ),
        (None, f" is missing: give {_CHOICES}"),
        (5, f"=5 is not allowed: give {_CHOICES}"),
        (
            PROFILE | {"ratios": [0.5, 0.25]},
            ": ratios [0.5, 0.25] do not ascend; put them in order.",
        ),
        (
            PROFILE | {"ratios": [0.5, 0.5]},
            ": ratios [0.5, 0.5] do not ascend; put them in order.",
        ),
        (
            PROFILE | {"fractions": {0: [0.4, 0.6], 1: [0.1]}},
            ": layer 1 has 1 fractions for 2 ratios; give one for each.",
        ),
        (
            PROFILE | {"fractions": {0: [0.4, 0.6], 1: [0.4, 0.4]}},
            ": at the ratio 0.25 the layers keep 0.4000 of a prompt on the mean; the two must be "
            "equal, so measure the profile again.",
        ),
        (
            PROFILE | {"fractions": {0: [0.4, 0.2], 1: [0.1, 0.8]}},
            ": layer 0 keeps less of a prompt at a larger ratio; measure the profile again.",
        ),
        (
            PROFILE | {"fractions": {0: [0.4, 1.6], 1: [0.1, 0.4]}},
            ".fractions.0.1=1.6 is not allowed: input should be less than or equal to 1.",
        ),
        (
            PROFILE | {"fractions": {-1: [0.4, 0.6], 1: [0.1, 0.4]}},
            ".fractions.-1=-1 is not allowed: input should be greater than or equal to 0.",
        ),
        (
            {"fractions": PROFILE["fractions"]},
            ".ratios is missing: give it.",
        ),
        (PROFILE | {"modell": "x"}, ".modell='x' is not a setting: use 'model'."),
    ],
)
def test_a_mistake_in_a_profile_is_answered(profile, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(with_profile(profile))
    assert str(error.value) == f"kv_compression_config.allocator.profile{sentence}"


HEADS = {0: [[0.5, 0.7], [0.3, 0.5]], 1: [[0.1, 0.4], [0.1, 0.4]]}


def test_a_profile_of_kv_heads_is_dealt_by():
    config = load_config(with_profile(PROFILE | {"head_fractions": HEADS}, uniform_share=0.5))
    assert config.allocator.head_shares() is None
    config = load_config(
        with_profile(PROFILE | {"head_fractions": HEADS}, uniform_share=0.5, per_head=True)
    )
    of_layers = config.allocator.head_shares()
    assert of_layers[0].ratios == (0.25, 0.5)
    assert of_layers[0].fractions == ((0.375, 0.6), (0.275, 0.5))
    again = load_config(config.to_dict())
    assert again.allocator.head_shares() == of_layers


@pytest.mark.parametrize(("per_head", "equal"), [(False, 0.4), (True, 0.2)])
def test_a_part_is_shared_equally_unless_it_is_said(per_head, equal):
    profile = PROFILE | {"head_fractions": HEADS}
    found, said = (
        load_config(with_profile(profile, per_head=per_head, **share)).allocator
        for share in ({}, {"uniform_share": equal})
    )
    assert found.shares(2) == said.shares(2)
    assert found.head_shares() == said.head_shares()


@pytest.mark.parametrize(
    ("heads", "sentence"),
    [
        ({0: HEADS[0]}, "head_fractions names other layers than fractions; measure it again."),
        (
            HEADS | {1: [[0.1, 0.4]]},
            "head_fractions has more heads in one layer than in another; measure it again.",
        ),
        (
            HEADS | {0: [[0.5, 0.7], [0.3]]},
            "head_fractions of layer 0 must have 2 fractions for each kv_head, one for each ratio; "
            "measure it again.",
        ),
        (
            HEADS | {0: [[0.5, 0.7], [0.5, 0.5]]},
            "at the ratio 0.25 the kv_heads of layer 0 do not keep what the layer does, on the "
            "mean; measure it again.",
        ),
        (
            HEADS | {1: [[0.2, 0.1], [0.0, 0.7]]},
            "a kv_head of layer 1 keeps less of a prompt at a larger ratio; measure it again.",
        ),
    ],
)
def test_a_mistake_in_what_a_profile_says_of_kv_heads_is_answered(heads, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(with_profile(PROFILE | {"head_fractions": heads}))
    assert str(error.value) == f"kv_compression_config.allocator.profile: {sentence}"


def test_a_profile_without_kv_heads_is_not_dealt_by_them():
    with pytest.raises(ConfigError) as error:
        load_config(with_profile(PROFILE, per_head=True))
    assert str(error.value) == (
        "kv_compression_config.allocator: per_head=True is not allowed: its profile says nothing "
        "of kv_heads; measure one with `ems-vllm calibrate`, or set it to false."
    )


def test_a_mistake_in_the_file_of_a_profile_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("ratios: [0.5]\nfractions: {0: [0.6], 1: [0.1]}\n")
    with pytest.raises(ConfigError) as error:
        load_config(with_profile(str(path)))
    assert str(error.value) == (
        f"kv_compression_config.allocator.profile='{path}': at the ratio 0.5 the layers keep "
        "0.3500 of a prompt on the mean; the two must be equal, so measure the profile again."
    )


@pytest.mark.parametrize(
    ("allocator", "sentence"),
    [
        ({"name": "pyramid", "beta": 1}, "beta=1 is not allowed: input should be greater than 1."),
        (
            {"name": "pyramid", "num_levels": 0},
            "num_levels=0 is not allowed: input should be greater than or equal to 1.",
        ),
        (
            {"name": "ada", "safeguard": 1.5},
            "safeguard=1.5 is not allowed: input should be less than or equal to 1.",
        ),
        ({"name": "uniform", "profile": "smol"}, "profile='smol' is not a setting: drop it."),
    ],
)
def test_a_mistake_in_an_allocator_is_answered(allocator, sentence):
    with pytest.raises(ConfigError) as error:
        load_config({"recipe": "ems", "allocator": allocator})
    assert str(error.value) == f"kv_compression_config.allocator.{sentence}"


@pytest.mark.parametrize("text", ["{", '{"budget": }', "{'budget': 1}", "no/such/file.yaml"])
def test_bad_override_text_is_answered(text):
    with pytest.raises(ConfigError, match="kv_compression_config="):
        parse_overrides(text)


@given(
    st.dictionaries(
        st.sampled_from([*KVCompressionConfig.model_fields, "x", ""]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.text(max_size=5), inner, max_size=2)
            ),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_anything_is_accepted_or_refused_with_a_sentence(overrides):
    try:
        config = load_config({"recipe": "ems", **overrides})
    except ConfigError as refusal:
        message = str(refusal)
    else:
        message = None
        assert config is None or load_config(config.to_dict()) == config
    assert message is None or message.endswith(".")
