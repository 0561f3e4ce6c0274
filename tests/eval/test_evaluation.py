# SPDX-License-Identifier: Apache-2.0
"""A run against an endpoint: what is asked, what is kept, how it goes on after a break."""

import json

import pytest
from eval.fake_server import FakeServer, Refusal
from rich.console import Console

from ems_vllm.config import ConfigError
from ems_vllm.eval.questions.sample import Key
from ems_vllm.eval.questions.tasks import TASKS
from ems_vllm.eval.records import preset
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import VLLM, Method
from ems_vllm.eval.records.results import EvalResult
from ems_vllm.eval.records.run_folder import RunFolder
from ems_vllm.eval.server import endpoint
from ems_vllm.eval.server.evaluation import Evaluation

pytestmark = pytest.mark.slow

SETTINGS = {
    "tasks": ["niah"],
    "lengths": [400, 900],
    "samples": 3,
    "recipes": ["ems"],
    "budgets": [0.25, 60],
    "concurrency": 2,
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0)


@pytest.fixture
def start(tokenizer, tmp_path):
    """Runs the preset with some settings changed against a server."""

    def run(server, output="out", **changes):
        chosen = preset.Preset.model_validate({"name": "test", **SETTINGS, **changes})
        return Evaluation(
            model="m",
            tokenizer=tokenizer,
            tokenizer_name="m",
            preset=chosen,
            folder=RunFolder(tmp_path / output),
            base_url=server.url,
            api_key="k",
            console=Console(quiet=True),
        )()

    return run


@pytest.fixture
def references(tokenizer):
    """The right answer by the prompt's tokens."""
    task = TASKS.get("niah")()
    return {
        sample.prompt_token_ids: sample.references[0]
        for length in SETTINGS["lengths"]
        for seed in (0, 1)
        for sample in task.samples(length, seed, 6, tokenizer)
    }


@pytest.fixture
def compressing(references):
    """Answers right if it may keep everything, and refuses as our servers do."""

    def answer(body):
        xargs = body.get("vllm_xargs", {})
        if xargs.get("kv_budget") == 0:
            raise Refusal(400, "vllm_xargs.kv_budget=0 is not allowed: at least 1.")
        is_full = xargs.get("kv_compression") == "off"
        return f" {references[tuple(body['prompt'])]}." if is_full else "no idea"

    with FakeServer(answer) as server:
        yield server


def asked(server):
    """Requests that were meant as questions."""
    return [body for body in server.requests if body["max_tokens"] > 1]


def test_result_is_complete(start, compressing, tmp_path):
    result = start(compressing)
    assert EvalResult.read(tmp_path / "out" / "results.json") == result
    assert result.higher_is_better == {"niah": True}
    full, quarter, sixty = result.methods
    assert full.is_full
    assert (quarter.method, quarter.budget_fraction, quarter.budget) == ("ems", 0.25, None)
    assert (sixty.budget_fraction, sixty.budget) == (None, 60)
    assert [sample.score for sample in full.samples] == 6 * [1]
    assert [sample.score for sample in quarter.samples] == 6 * [0]
    assert [s.length for s in full.samples] == [400, 400, 400, 900, 900, 900]
    for method in result.methods:
        assert method.serving.peak_blocks == 25
        assert method.serving.ttft_s > 0
        assert method.serving.output_tokens_per_s > 0
        assert method.serving.blocks_per_request == 1
        assert all(sample.prompt_tokens == 7 for sample in method.samples)


def test_requests_ask_for_the_budget_of_their_length(start, compressing):
    start(compressing, recipes=["snapkv"])
    budgets = {}
    for body in asked(compressing):
        assert body["temperature"] == 0
        budget = body["vllm_xargs"].get("kv_budget")
        budgets.setdefault(budget, set()).add(len(body["prompt"]) > 400)
    # 100 of 400, less a tail of 16 to 31: 64 or 80. 225 of 900: 192 or 208. And 60: 16, 32.
    assert set(budgets) <= {None, 64, 80, 192, 208, 16, 32}
    assert all(budgets[budget] == {True} for budget in budgets if budget in (192, 208))
    assert all(budgets[budget] == {False} for budget in budgets if budget in (64, 80))


def test_no_request_can_hit_the_prefix_cache(start, compressing):
    start(compressing)
    salts = [body["cache_salt"] for body in compressing.requests]
    assert len(set(salts)) == len(salts)


def test_a_length_without_room_for_a_block_is_left_out(start, compressing):
    (_, method) = start(compressing, budgets=[0.06], lengths=[400, 900]).methods
    # 24 of 400 entries are fewer than a window of 16 and a block; 54 of 900 are not.
    assert {sample.length for sample in method.samples} == {900}
    assert method.settings["lengths_left_out"] == [400]


def test_finished_samples_are_not_asked_again(start, compressing):
    first = start(compressing)
    count = len(asked(compressing))
    again = start(compressing)
    assert len(asked(compressing)) == count
    assert [m.samples for m in again.methods] == [m.samples for m in first.methods]
    more = start(compressing, samples=4)
    # One more sample at each of two lengths, for each of three methods.
    assert len(asked(compressing)) == count + 6
    assert [m.samples[:3] for m in more.methods] == [m.samples[:3] for m in first.methods]


def test_a_broken_run_goes_on_where_it_broke(start, references, tmp_path):
    """The server dies after some answers; the half line that was being written is dropped."""
    answers_left = 4

    def answer(body):
        nonlocal answers_left
        answers_left -= 1
        if answers_left < 0:
            raise Refusal(500, "dead")
        return references[tuple(body["prompt"])]

    with FakeServer(answer) as server:
        broken = start(server, recipes=[])
        assert [s.score for s in broken.methods[0].samples].count(1) == 4
        failed = [s for s in broken.methods[0].samples if s.error]
        assert len(failed) == 2
        assert "no answer in 6 attempts, the last time: HTTP 500: dead" in failed[0].error
        with (tmp_path / "out" / "samples" / "full.jsonl").open("a") as file:
            file.write('{"result": {"task": "ni')
        answers_left = 100
        count = len(asked(server))
        (full,) = start(server, recipes=[]).methods
        assert len(asked(server)) == count + 2
    assert [s.score for s in full.samples] == 6 * [1]


def test_a_refusal_is_not_repeated(start, references):
    def answer(body):
        raise Refusal(400, "too long")

    with FakeServer(answer) as server:
        (full,) = start(server, recipes=[]).methods
        assert len(asked(server)) == 6
    assert {s.error for s in full.samples} == {"HTTP 400: too long"}
    assert {s.score for s in full.samples} == {0}


def test_a_plain_endpoint_gets_plain_requests(start, references):
    with FakeServer(lambda body: references[tuple(body["prompt"])], is_vllm=False) as server:
        (full,) = start(server, recipes=[]).methods
    for body in server.requests:
        assert not {"vllm_xargs", "cache_salt"} & set(body)
    assert full.serving.peak_blocks is None
    assert [s.score for s in full.samples] == 6 * [1]


def test_a_later_question_takes_the_budget_of_its_document(tokenizer):
    task = TASKS.get("niah")()
    last, later = (task.sample(Key("niah", 900, 0, 0, p), tokenizer) for p in ("last", "later"))
    server = preset.ServerSettings()
    method = Method("ems", VLLM, Budget.parse(0.25))
    for sample in (last, later):
        prompt_len = len(sample.prompt_token_ids)
        asked = method.kv_budget(sample, prompt_len, server)
        held = asked + prompt_len - (prompt_len - 16) // 16 * 16
        assert 225 - 16 < held <= 225
    # A list that is compressed while it is written needs room for what comes before the next time.
    written = TASKS.get("long_generation")().sample(Key("long_generation", 2000, 0, 0), tokenizer)
    assert method.kv_budget(written, 30, server) <= 500 - 256 - 16 - 16


def test_turns_are_sent_one_after_the_other_with_their_answers(start):
    with FakeServer(lambda body: f"answer {len(body['messages'])}") as server:
        start(server, tasks=["multi_turn"], lengths=[1500], samples=1, recipes=[])
    conversations = [body["messages"] for body in server.requests]
    assert [len(messages) for messages in conversations] == [1, 3, 5, 7, 9, 11]
    assert [m["content"] for m in conversations[-1] if m["role"] == "assistant"] == [
        f"answer {n}" for n in (1, 3, 5, 7, 9)
    ]
    assert [body["max_tokens"] for body in server.requests] == [*5 * [16], 32]


def test_mistakes_end_in_a_sentence(start, compressing, references, tmp_path):
    with pytest.raises(ConfigError, match=r"^recipes=ems,h2o is not possible with base_url='http"):
        start(compressing, recipes=["ems", "h2o"])
    with FakeServer(lambda body: "x") as plain:
        with pytest.raises(ConfigError, match=r"^base_url='.*' does not compress: start it with"):
            start(plain)
        with pytest.raises(ConfigError, match=r"^tasks='long_generation' needs answers that are"):
            start(plain, "other", tasks=["long_generation"], recipes=[])
        start(plain, "third", recipes=[])
        with pytest.raises(ConfigError, match=r"^output='.*third' holds another run"):
            start(plain, "third", recipes=[], max_tokens=5)
        journal = tmp_path / "third" / "samples" / "full.jsonl"
        journal.write_text(json.dumps({"something": "else"}) + "\n")
        with pytest.raises(ConfigError, match=r"holds lines that are no answers: give another"):
            start(plain, "third", recipes=[])
    with pytest.raises(ConfigError, match=r"^base_url='.*' does not answer"):
        start(plain, "fourth")
