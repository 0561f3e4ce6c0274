# SPDX-License-Identifier: Apache-2.0
"""`python -m ems_vllm.eval.lab.answers`: other engines' losses, counted as an ablation's."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ems_vllm.config import ConfigError
from ems_vllm.eval.lab.answers import losses, main
from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine

app = typer.Typer()
app.command()(main)


def prompt(**fields):
    values = {
        "task": "niah", "length": 64, "seed": 0, "index": 0, "protocol": "last", "depth": None,
        "prompt": "", "prompt_token_ids": (1, 2), "max_tokens": 1, "stop": (), "references": ("7",),
        "gold_token_ids": (3, 4, 5),
    }  # fmt: skip
    return PromptLine(**{**values, **fields})


def answer(of, **fields):
    return AnswerLine(**{name: getattr(of, name) for name in AnswerLine.model_fields if name in
        ("task", "length", "seed", "index", "protocol")}, **fields)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "answered", "group", "expected"),
    [
        # The prompt itself predicts the first token.
        ({}, {"gold_logprobs": (-9, -1, -2)}, "last", 1.5),
        # After a question or a beginning of the answer, a compressed cache predicts all.
        (
            {"protocol": "later", "written_token_ids": (8,)},
            {"gold_logprobs": (-3, -1, -2)},
            "later",
            2.0,
        ),
        (
            {"protocol": "first", "lead_token_ids": (8, 9)},
            {"gold_logprobs": (-3, -1, -2)},
            "first",
            2.0,
        ),
        (
            {"gold_token_ids": (), "continuation_token_ids": (5, 6, 7)},
            {"logprobs": (-9, -1, -3)},
            "continuation",
            2.0,
        ),
    ],
)
def test_what_the_prompt_predicts_does_not_count(asked, answered, group, expected):
    one = prompt(**asked)
    assert losses([one], [answer(one, **answered)]) == {group: {"niah/0/0": expected}}


def test_what_was_not_forced_is_left_out():
    known, unknown, missing = prompt(), prompt(index=1), prompt(index=2)
    answers = [answer(known, gold_logprobs=(-1, -1, -1)), answer(unknown, output="7")]
    assert losses([known, unknown, missing], answers) == {"last": {"niah/0/0": 1.0}}


def test_prompts_of_two_lengths_are_refused():
    both = [prompt(), prompt(length=128)]
    with pytest.raises(ConfigError, match="one length at a time"):
        losses(both, [answer(one, gold_logprobs=(-1, -1, -1)) for one in both])


def write(path, lines):
    path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
    return str(path)


def test_losses_are_above_the_same_engines_full_cache(tmp_path):
    one = prompt()
    prompts = write(tmp_path / "prompts.jsonl", [one])
    full = write(tmp_path / "kv-full.jsonl", [answer(one, gold_logprobs=(-1, -1, -1))])
    half = write(tmp_path / "kv-knorm-0.5.jsonl", [answer(one, gold_logprobs=(-1, -2, -3))])
    arguments = ["--prompts", prompts, "--full", full, "--engine", "kv 1", "--model", "M"]
    out = tmp_path / "losses.json"
    done = CliRunner().invoke(app, [half, full, *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["full"] == {"last": {"niah/0/0": 1.0}}
    assert result["losses"] == {"knorm-0.5": {"last": {"niah/0/0": 1.5}}}


def test_answers_that_were_not_forced_are_refused(tmp_path):
    one = prompt()
    prompts = write(tmp_path / "prompts.jsonl", [one])
    full = write(tmp_path / "kv-full.jsonl", [answer(one, output="7")])
    arguments = ["--prompts", prompts, "--full", full, "--engine", "kv 1", "--model", "M"]
    done = CliRunner().invoke(app, [full, *arguments, "--out", str(tmp_path / "out.json")])
    assert isinstance(done.exception, ConfigError)
    assert "have the engine force them" in str(done.exception)
