# SPDX-License-Identifier: Apache-2.0
"""Presets are complete, and a mistake in one is one sentence."""

import json
import sys

import pytest
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.config import ConfigError, load_config
from ems_vllm.eval.records import preset
from ems_vllm.eval.records.budget import Budget, smallest_total

VALID = {
    "tasks": ["niah"],
    "lengths": [1024],
    "samples": 1,
    "recipes": ["ems"],
    "budgets": [0.25],
}


def write(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**VALID, **changes}))
    return str(path)


@pytest.mark.parametrize("name", preset.names())
def test_shipped_presets_are_valid(name):
    loaded = preset.load(name, {})
    assert loaded.name == name
    assert set(loaded.per_task) <= set(loaded.tasks)
    smallest = smallest_total(loaded.server.recent_window, loaded.server.block_size)
    for value in loaded.budgets:
        # Every budget is measured at one length at least.
        longest = max(n for task in loaded.tasks for n in loaded.lengths_of(task))
        assert Budget.parse(value).total(longest) >= smallest
    for recipe in loaded.recipes:
        assert load_config({"recipe": recipe, **loaded.server.recipe_overrides(4096)})


def test_command_line_wins(tmp_path):
    path = write(tmp_path, per_task={"niah": {"lengths": [2048], "samples": 9}})
    assert preset.load(path, {}).lengths_of("niah") == (2048,)
    changed = preset.load(path, {"lengths": [512], "budgets": None})
    assert changed.budgets == (0.25,)
    merged = changed.with_command_line(lengths=True, samples=False, args=["--dtype", "float32"])
    assert merged.lengths_of("niah") == (512,)
    assert merged.samples_of("niah") == 9
    assert merged.server.args == ("--dtype", "float32")


def test_a_task_is_asked_in_the_protocols_that_it_can_be_written_in(tmp_path):
    tasks = ["niah", "bits_per_byte", "lm_eval:gsm8k"]
    path = write(tmp_path, tasks=tasks, protocols=["later", "last", "later"])
    loaded = preset.load(path, {})
    assert loaded.protocols_of("niah") == ("later", "last")
    assert loaded.protocols_of("bits_per_byte") == loaded.protocols_of("lm_eval:gsm8k") == ("last",)
    assert preset.load(write(tmp_path), {}).protocols_of("niah") == ("last",)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"taks": ["niah"]}, "preset.taks=['niah'] is not a setting: use 'tasks'."),
        ({"server": {"window": 3}}, "preset.server.window=3 is not a setting"),
        ({"tasks": ["nihah"]}, "tasks='nihah' is not a task: unknown task 'nihah'; did you mean"),
        ({"recipes": ["emz"]}, "kv_compression='emz' is not a recipe"),
        ({"budgets": [1.5]}, "budgets=1.5 is not a budget: give entries"),
        ({"lengths": [0]}, "preset.lengths.0=0 is not allowed"),
        ({"samples": "many"}, "preset.samples='many' is not allowed"),
        ({"depths": [2]}, "preset.depths.0=2 is not allowed"),
        ({"protocols": ["lats"]}, "preset.protocols.0='lats' is not allowed"),
        ({"protocols": []}, "preset.protocols=[] is not allowed"),
        ({"prompt_format": "poem"}, "preset.prompt_format='poem' is not allowed"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(ConfigError) as error:
        preset.load(write(tmp_path, **changes), {})
    assert str(error.value).startswith(sentence)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--preset", "tinny"], "preset='tinny' is not a preset: use full, gemma3-270m, gpu_first"),
        (["--preset", "none.yaml"], "preset='none.yaml' cannot be read"),
        (["--preset", "smoke", "--lengths", "512,long"], "lengths='512,long' is not allowed"),
        (["--preset", "smoke", "--budgets", "some"], "budgets='some' is not allowed"),
        (["--preset", "smoke", "--server-args", "'"], 'server_args="\'" cannot be read'),
        (["--preset", "smoke", "--output", "out"], "tokenizer='no-such-model' cannot be loaded"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, args, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = CliRunner().invoke(cli.app, ["eval", "no-such-model", *args]).exception
    assert isinstance(error, ConfigError), error
    assert str(error).startswith(sentence)
    assert str(error).endswith(".")


def test_a_missing_client_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ems_vllm.eval.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openai", None)
    error = CliRunner().invoke(cli.app, ["eval", "m", "--preset", "smoke"]).exception
    assert str(error) == "`ems-vllm eval` needs the package openai: pip install 'ems-vllm[eval]'."


def test_reading_a_result_that_is_none(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    args = ["report", str(tmp_path / "r.json"), "--output", str(tmp_path)]
    error = CliRunner().invoke(cli.app, args).exception
    assert "r.json' cannot be read (not the JSON of a result): give a file that" in str(error)
