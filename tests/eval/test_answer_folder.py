# SPDX-License-Identifier: Apache-2.0
"""Folders of answers that fill bit by bit, and where an answer ends."""

import itertools
import json
import math

import pytest
import torch

from ems_vllm.config import ConfigError
from ems_vllm.eval.records.answer_folder import (
    AnswerFile,
    check_manifest,
    missing,
    write_result,
)
from ems_vllm.eval.records.prompt_files import PromptLine, read_prompts
from ems_vllm.eval.records.results import EvalResult, MethodResult
from ems_vllm.eval.transformers_engine.answer import (
    Vocabulary,
    answer_line,
    answer_together,
    answering,
    following,
    recording,
)


def prompt_line(index=0, **fields):
    values = {
        "task": "niah",
        "length": 64,
        "depth": 0.5,
        "seed": 3,
        "prompt": "ab",
        "prompt_token_ids": (5, 6),
        "max_tokens": 8,
        "stop": (),
        "references": ("seven",),
        **fields,
    }
    return PromptLine(index=index, **values)


def write_prompts(path, *prompts):
    path.write_text("".join(f"{prompt.model_dump_json()}\n" for prompt in prompts))
    return path


def test_answers_go_on_after_the_last_complete_line(tmp_path):
    path = tmp_path / "folder" / "answers.jsonl"
    first, second, third = (prompt_line(index) for index in range(3))
    with AnswerFile(path) as answers:
        answers.write(answer_line(first, output="one\ntwo"))
        answers.write(answer_line(second, output="ä"))
    with path.open("ab") as file:
        file.write(b'{"task": "niah", "leng')
    with AnswerFile(path) as answers:
        assert answers.done == {first.key, second.key}
        answers.write(answer_line(third, error="too long"))
        assert third.key in answers.done
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line.get("output") for line in lines] == ["one\ntwo", "ä", None]
    assert lines[2]["error"] == "too long"


def test_answers_become_one_result(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", prompt_line(0), prompt_line(1))
    answers = {}
    for name, output in (("good", "It is seven."), ("bad", "No idea.")):
        path = tmp_path / f"{name}.jsonl"
        with AnswerFile(path) as file:
            for prompt in read_prompts(prompts):
                file.write(answer_line(prompt, output=output))
        answers[path] = MethodResult(method=name, engine="other", budget=32)
    read = read_prompts(prompts)
    write_result(tmp_path / "result.json", read, answers, "model", {"dtype": "float32"})
    result = EvalResult.read(tmp_path / "result.json")
    scores = {m.method: [s.score for s in m.samples] for m in result.methods}
    assert scores == {"good": [1, 1], "bad": [0, 0]}
    assert result.environment == {"dtype": "float32"}


def test_what_is_left_to_do(tmp_path):
    long, short = prompt_line(0, prompt_token_ids=(5, 6, 7)), prompt_line(1)
    with AnswerFile(tmp_path / "a") as one, AnswerFile(tmp_path / "b") as other:
        one.write(answer_line(long))
        todo = missing([long, short], {"one": one, "other": other})
        assert [(item.prompt, item.methods) for item in todo] == [
            (short, ["one", "other"]),
            (long, ["other"]),
        ]


def test_answers_of_different_runs_do_not_mix(tmp_path):
    manifest = {"model": "a", "seed": 0}
    check_manifest(tmp_path / "folder", manifest)
    check_manifest(tmp_path / "folder", manifest)
    with pytest.raises(ConfigError, match=r"model='a', and this run has 'b': choose another"):
        check_manifest(tmp_path / "folder", {**manifest, "model": "b"})


class Scripts:
    """Models side by side that say their texts, whatever they are told, and remember that."""

    def __init__(self, *texts):
        self._texts = [
            itertools.chain(map(ord, text), itertools.repeat(ord("~"))) for text in texts
        ]
        self.told = []

    def logits(self):
        tokens = torch.tensor([next(text) for text in self._texts])
        return torch.nn.functional.one_hot(tokens, 128).float()

    def step(self, token_ids):
        self.told.append(spell(token_ids))
        return self.logits()

    def answers(self, eos="", **fields):
        vocabulary = Vocabulary(spell, [ord(eos)] if eos else [])
        prompt = prompt_line(**fields)
        running = [answering(prompt, logits, vocabulary) for logits in self.logits()]
        return answer_together(running, self.step)


def spell(token_ids):
    return "".join(map(chr, token_ids))


def output(text, **fields):
    (line,) = Scripts(text).answers(**fields)
    return line.output


def test_answer_ends_at_max_tokens():
    script = Scripts("abcdef")
    (line,) = script.answers(max_tokens=4)
    assert (line.key, line.output, line.prompt_tokens) == (prompt_line().key, "abcd", 2)
    # The last token is not worth a step.
    assert script.told == ["a", "b", "c"]


def test_answer_ends_before_the_first_stop_text():
    assert output("ab--\ncd", stop=("\n", "--")) == "ab"
    assert output("ab-\ncd", stop=("\n", "--")) == "ab-"


def test_answer_ends_with_an_eos_token():
    assert output("ab.cd", eos=".") == "ab."


def test_answers_side_by_side_end_on_their_own():
    scripts = Scripts(".", "ab.", "cdefgh")
    lines = scripts.answers(eos=".", max_tokens=4)
    assert [line.output for line in lines] == [".", "ab.", "cdef"]
    # A finished answer has a token to repeat, or none if it was finished at once.
    assert [told[1:] for told in scripts.told] == ["ac", "bd", "be"]


def test_a_question_that_comes_later_is_fed_before_the_answer():
    # Whatever the model would have written there is of no account.
    script = Scripts("xyzabc")
    (line,) = script.answers(written_token_ids=tuple(map(ord, "Q?:")), max_tokens=3)
    assert line.output == "abc"
    assert script.told == ["Q", "?", ":", "a", "b"]


def test_the_full_cache_s_answer_is_followed_up_to_the_first_other_choice():
    vocabulary = Vocabulary(spell, [ord(".")])
    prompt = prompt_line(written_token_ids=(ord("Q"),), max_tokens=9, follows_full=True)

    def run(script, start):
        (first,) = script.logits()
        running = start(first)
        try:
            token = next(running)
            while True:
                token = running.send(script.step([token])[0])
        except StopIteration as finished:
            return finished.value

    full = run(Scripts("xabcd."), lambda first: recording(prompt, first, vocabulary))
    assert spell(full.token_ids) == "abcd."
    same = run(Scripts("xabcd."), lambda first: following(prompt, first, full, vocabulary))
    assert (same.followed.num_same, same.followed.num_tokens) == (5, 5)
    assert same.followed.kl == pytest.approx(0, abs=1e-6)
    script = Scripts("xabXd.")
    other = run(script, lambda first: following(prompt, first, full, vocabulary))
    assert other.output == "ab"
    assert other.followed.num_same == 2
    assert other.followed.kl > 0
    # What is predicted is the full cache's answer, whatever the method would have written.
    assert "".join(script.told) == "Qabcd"


def test_an_engine_that_cannot_follow_says_so():
    with pytest.raises(ConfigError, match="follows the full cache's answer, which this engine"):
        Scripts("abc").answers(follows_full=True)


def test_a_continuation_is_predicted_token_by_token():
    script = Scripts("abc")
    tokens = tuple(map(ord, "axc"))
    (line,) = script.answers(continuation_token_ids=tokens, continuation_bytes=3)
    assert script.told == ["a", "x"]
    # A one-hot row of 128 logits gives its token e / (e + 127), every other one 1 / (e + 127).
    other = -math.log(math.e + 127)
    assert line.logprobs == pytest.approx([1 + other, other, 1 + other], abs=1e-5)
