# SPDX-License-Identifier: Apache-2.0
"""`python -m ems_vllm.eval.transformers_engine`, from a file of prompts to a result."""

import pytest
import typer
from engine.harness import LLAMA, tokens
from typer.testing import CliRunner

from ems_vllm.config import ConfigError
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.records.results import EvalResult
from ems_vllm.eval.transformers_engine.__main__ import main

app = typer.Typer()
app.command()(main)


@pytest.fixture
def prompts(tmp_path):
    lines = [
        PromptLine(
            task="niah", length=256, depth=0.5, seed=0, index=index, prompt="",
            prompt_token_ids=tokens(200 + index, seed=index), max_tokens=6, stop=(),
            references=("7",),
        )
        for index in range(2)
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    return path


def run(prompts, out, *more):
    arguments = [
        "--model", LLAMA, "--prompts", str(prompts), "--out", str(out), "--device", "cpu",
        "--recipe", "full", "--recipe", "ems", "--budget", "64", *more,
    ]  # fmt: skip
    return CliRunner().invoke(app, arguments)


def test_prompts_become_a_result_bit_by_bit(prompts, tmp_path):
    out = tmp_path / "answers"
    assert run(prompts, out, "--limit", "1").exit_code == 0
    first = (out / "transformers-ems-64.jsonl").read_text()
    assert run(prompts, out).exit_code == 0
    # What was answered is not asked again.
    assert (out / "transformers-ems-64.jsonl").read_text().startswith(first)
    result = EvalResult.read(out / "transformers.json")
    full, ems = result.methods
    assert (full.method, full.engine, full.is_full) == ("full", "transformers", True)
    assert (ems.method, ems.budget, ems.settings["budget"]) == ("ems", 64, 48)
    assert [sample.index for sample in ems.samples] == [0, 1]
    assert all(a.output != b.output for a, b in zip(full.samples, ems.samples, strict=True))
    # The compiled operators are another way to the same answers, but another run.
    error = run(prompts, out, "--compiled").exception
    assert isinstance(error, ConfigError)
    assert "choose another folder" in str(error)
    other = tmp_path / "compiled"
    assert run(prompts, other, "--compiled").exit_code == 0
    for name in ("transformers-ems-64.jsonl", "transformers-full.jsonl"):
        assert (other / name).read_text() == (out / name).read_text()


def test_mistakes_are_named_and_leave_nothing_behind(prompts, tmp_path):
    for options, message in (
        (("--recipe", "emms"), "'emms' is not a recipe"),
        (("--budget", "0"), "budgets='0' is not a budget"),
        (("--config", '{"recent_window": "x"}'), "recent_window='x' is not allowed"),
    ):
        error = run(prompts, tmp_path / "out", *options).exception
        assert isinstance(error, ConfigError)
        assert message in str(error)
    assert not (tmp_path / "out").exists()
