# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness go through its own client, with our arguments."""

import sys
import types

import pytest
from eval.fake_server import FakeServer, Refusal
from rich.console import Console

from ems_vllm.config import ConfigError
from ems_vllm.eval.records import preset
from ems_vllm.eval.records.run_folder import RunFolder
from ems_vllm.eval.server.evaluation import Evaluation

SETTINGS = {
    "name": "test",
    "tasks": ["lm_eval:gsm8k"],
    "lengths": [1024],
    "samples": 2,
    "recipes": ["ems"],
    "budgets": [0.25],
}


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm-evaluation-harness that remembers its arguments."""
    module = types.ModuleType("lm_eval")
    module.calls = []

    def simple_evaluate(**arguments):
        module.calls.append(arguments)
        answers = [
            {"doc_id": i, "filter": name, "filtered_resps": [str(i)], "metrics": ["exact_match"],
             "exact_match": float(i == 0 or name == "flexible-extract")}
            for name in ("strict-match", "flexible-extract")
            for i in range(arguments["limit"])
        ]  # fmt: skip
        return {"samples": {arguments["tasks"][0]: answers}}

    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return module


@pytest.fixture
def server():
    def answer(body):
        raise Refusal(400, "vllm_xargs.kv_budget=0 is not allowed: at least 1.")

    with FakeServer(answer) as running:
        yield running


def run(server, tmp_path, **changes):
    return Evaluation(
        model="m",
        tokenizer=None,
        tokenizer_name="t",
        preset=preset.Preset.model_validate({**SETTINGS, **changes}),
        folder=RunFolder(tmp_path),
        base_url=server.url,
        api_key="k",
        console=Console(quiet=True),
    )()


def test_answers_become_samples(harness, server, tmp_path):
    full, quarter = run(server, tmp_path).methods
    for method in (full, quarter):
        assert [(s.task, s.length, s.index, s.score) for s in method.samples] == [
            ("lm_eval:gsm8k", 1024, 0, 1),
            ("lm_eval:gsm8k", 1024, 1, 1),
        ]
    first, second = harness.calls
    assert first["model"] == "local-completions"
    assert first["model_args"]["base_url"] == f"{server.url}/v1/completions"
    assert first["model_args"]["tokenizer"] == "t"
    assert first["gen_kwargs"]["vllm_xargs"] == {"kv_compression": "off"}
    # 256 entries less 16 of the recent window, which may become 15 longer: 14 blocks.
    assert second["gen_kwargs"]["vllm_xargs"] == {"kv_budget": 224}


def test_a_finished_task_is_not_run_again(harness, server, tmp_path):
    run(server, tmp_path)
    run(server, tmp_path)
    assert len(harness.calls) == 2


def test_chat_models_are_asked_as_such(harness, server, tmp_path):
    run(server, tmp_path, prompt_format="chat", recipes=[])
    (call,) = harness.calls
    assert call["model"] == "local-chat-completions"
    assert call["model_args"]["base_url"].endswith("/v1/chat/completions")
    assert call["apply_chat_template"]


def test_a_missing_harness_is_one_sentence(monkeypatch, server, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"^tasks='lm_eval:gsm8k' needs lm-evaluation-harness"):
        run(server, tmp_path)


def test_a_failure_of_the_harness_is_one_sentence(monkeypatch, harness, server, tmp_path):
    def fail(**_):
        raise KeyError("gsm9k")

    monkeypatch.setattr(harness, "simple_evaluate", fail)
    with pytest.raises(ConfigError, match=r"failed in lm-evaluation-harness \(KeyError: 'gsm9k'\)"):
        run(server, tmp_path)
