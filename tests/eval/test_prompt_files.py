# SPDX-License-Identifier: Apache-2.0
"""Prompts go to another engine and its answers come back as a result."""

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.config import ConfigError
from ems_vllm.eval.questions.tasks import TASKS
from ems_vllm.eval.records import prompt_files, scoring
from ems_vllm.eval.records.results import EvalResult


@pytest.fixture
def samples(tokenizer):
    task = TASKS.get("niah")()
    return [s for length in (400, 800) for s in task.samples(length, 7, 3, tokenizer)]


@pytest.fixture
def prompts(samples, tmp_path):
    path = tmp_path / "prompts.jsonl"
    assert prompt_files.export(samples, path) == len(samples)
    return path


def answer(sample, **fields):
    return {
        "task": sample.task,
        "length": sample.length,
        "seed": sample.seed,
        "index": sample.index,
        **fields,
    }


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(prompts, answers, output):
    arguments = [
        "score", "--prompts", str(prompts), "--answers", str(answers), "--output", str(output),
        "--method", "snapkv", "--engine", "kvpress", "--budget", "0.25", "--model", "tiny",
    ]  # fmt: skip
    return CliRunner().invoke(cli.app, arguments)


def test_export_reads_back_as_it_was(samples, prompts):
    lines = list(prompt_files.read(prompts, prompt_files.PromptLine, "prompts"))
    assert [line.sample() for line in lines] == samples


def test_a_question_that_comes_later_can_be_exchanged(tokenizer, tmp_path):
    task = TASKS.get("niah")()
    both = [s for p in ("last", "later") for s in task.samples(400, 7, 2, tokenizer, p)]
    path = tmp_path / "p.jsonl"
    assert prompt_files.export(both, path) == 4
    lines = list(prompt_files.read(path, prompt_files.PromptLine, "prompts"))
    assert [line.sample() for line in lines] == both
    assert [bool(line.written_token_ids) for line in lines] == [False, False, True, True]
    right = [answer(s, protocol=s.protocol, output=s.references[0]) for s in both]
    assert run(path, write(tmp_path / "a.jsonl", right), tmp_path / "r.json").exit_code == 0
    (method,) = EvalResult.read(tmp_path / "r.json").methods
    assert [s.protocol for s in method.samples] == ["last", "last", "later", "later"]
    error = run(path, write(tmp_path / "a.jsonl", right[:3]), tmp_path / "r.json").exception
    assert "no answer to task='niah' length=400 seed=7 index=1 protocol='later'" in str(error)


def test_a_list_that_is_compressed_while_it_is_written_is_left_out(tokenizer, tmp_path):
    written = TASKS.get("long_generation")().samples(900, 0, 1, tokenizer)
    assert prompt_files.export(written, tmp_path / "p.jsonl") == 0


def test_results_without_a_protocol_are_of_the_question_last(samples, prompts, tmp_path):
    right = [answer(s, output=s.references[0]) for s in samples]
    assert run(prompts, write(tmp_path / "a.jsonl", right), tmp_path / "r.json").exit_code == 0
    old = json.loads((tmp_path / "r.json").read_text())
    for sample in old["methods"][0]["samples"]:
        assert sample.pop("protocol") == "last"
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert EvalResult.read(tmp_path / "old.json") == EvalResult.read(tmp_path / "r.json")


def test_conversations_are_left_out(samples, tmp_path):
    conversation = replace(samples[0], turns=("a", "b"))
    assert prompt_files.export([conversation, samples[1]], tmp_path / "p.jsonl") == 1


def test_answers_are_scored(samples, prompts, tmp_path):
    right = [answer(s, output=f" it is {s.references[0]}.", prompt_tokens=9) for s in samples[1:]]
    answers = write(tmp_path / "a.jsonl", [*reversed(right), answer(samples[0], output="no idea")])
    result = run(prompts, answers, tmp_path / "out" / "r.json")
    assert result.exit_code == 0, result.output
    read = EvalResult.read(tmp_path / "out" / "r.json")
    (method,) = read.methods
    assert (method.method, method.engine, method.budget_fraction) == ("snapkv", "kvpress", 0.25)
    assert read.model == "tiny"
    assert read.higher_is_better == {"niah": True}
    assert [s.score for s in method.samples] == [0] + 5 * [1]
    assert [s.depth for s in method.samples] == [s.depth for s in samples]
    assert method.samples[1].prompt_tokens == 9


def test_an_error_scores_nothing(samples):
    line = prompt_files.AnswerLine(
        **answer(samples[0], output=samples[0].references[0], error="out of memory")
    )
    scored = scoring.scored(samples[0], line)
    assert (scored.score, scored.error) == (0, "out of memory")


def test_bits_per_byte_of_a_continuation(samples):
    sample = replace(samples[0], continuation_token_ids=(5, 6, 7), continuation_bytes=6)
    line = prompt_files.AnswerLine(
        **answer(sample, logprobs=[math.log(1 / 2), math.log(1 / 8), 0.0])
    )
    # 1 + 3 + 0 bits over 6 bytes.
    assert scoring.scored(sample, line).score == pytest.approx(4 / 6)
    with pytest.raises(ConfigError, match="has 0 values: give one for each of the 3 tokens"):
        scoring.scored(sample, prompt_files.AnswerLine(**answer(sample, output="text")))


def test_mistakes_end_in_a_sentence(samples, prompts, tmp_path):
    good = [answer(s, output="") for s in samples]
    cases = {
        "has no answer to task='niah' length=400 seed=7 index=0": good[1:],
        "answers task='niah' length=400 seed=7 index=0 twice": [good[0], *good],
        "answers task='niah' length=400 seed=7 index=99": [*good, {**good[0], "index": 99}],
        "answers line 2: outputs='a' is not a setting: use 'output'": [
            good[0],
            answer(samples[1], outputs="a"),
        ],
    }
    for message, lines in cases.items():
        error = run(prompts, write(tmp_path / "a.jsonl", lines), tmp_path / "r.json").exception
        assert isinstance(error, ConfigError)
        assert message in str(error)
        assert str(error).endswith(".")
    error = run(prompts, tmp_path / "none.jsonl", tmp_path / "r.json").exception
    assert "answers=" in str(error)
    assert "cannot be read" in str(error)
