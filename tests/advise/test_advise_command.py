# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm advise` from a file to a suggestion."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.advise.report import AdviceReport
from ems_vllm.config import ConfigError

LLAMA = Path(__file__).resolve().parents[2] / "models" / "random-llama"
TEXTS = resources.files("ems_vllm.eval.questions") / "texts"


def run(*args):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["advise", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def config_alone(tmp_path):
    """A model of which nothing can be run."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(LLAMA / "config.json", folder)
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def text():
    (path,) = (entry for entry in TEXTS.iterdir() if entry.name.endswith(".txt"))
    return path.read_text(encoding="utf-8")


def test_a_sample_is_run_and_a_page_written(tmp_path):
    words = text().split()
    asked = [
        {"body": {"messages": [{"role": "user", "content": " ".join(words[at : at + 220])}],
                  "max_tokens": 32}}
        for at in (0, 300, 600)
    ]  # fmt: skip
    path = write(tmp_path / "batch.jsonl", [*asked, {"prompt": "Who?", "max_tokens": 4}])
    result = run(
        LLAMA, "--prompts", path, "--budget", "64", "--budget", "8192", "--sample", "2",
        "--tokens", "6", "--pool-gib", "0.05", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    report = AdviceReport.model_validate_json(result.stdout)
    assert "about" in result.stderr
    whole, small = report.budgets
    assert (whole.label, small.label) == ("8,192", "64")
    # What keeps all is the dense cache, to the last bit.
    assert whole.quality.kl == (0, 0)
    assert whole.quality.same_top == 1
    assert min(small.quality.kl) > 1e-3
    assert small.quality.same_top <= 1
    assert small.by_length.compressed_share == 0.75
    assert whole.by_length == report.dense
    assert (report.sample.num_prompts, report.sample.num_eligible) == (2, 3)
    assert report.traffic.num_with_text == 4
    page = (tmp_path / "out" / "advice.md").read_text()
    assert report.suggestion.command in page
    assert "| 64 |" in page or "| **64** |" in page
    assert (tmp_path / "out" / "advice.svg").read_text().startswith("<?xml")
    written = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert AdviceReport.model_validate(written) == report


def test_lengths_need_the_models_configuration_alone(tmp_path, config_alone):
    lines = [
        {"arrival_time": at / 5, "prompt_tokens": 3000 + at, "completion_tokens": 200}
        for at in range(60)
    ]
    path = write(tmp_path / "log.jsonl", lines)
    result = run(config_alone, "--prompts", path, "--kv-cache-memory-bytes", 100 * 2**20)
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:-1])
    assert "the file has lengths alone" in result.stdout
    assert "Replay of the arrivals" in result.stdout
    assert "compress, not measured: " in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"vllm serve {config_alone} --kv-compression ems")
    assert last.endswith(f"--kv-cache-memory-bytes {100 * 2**20}")


def test_what_is_switched_off_or_too_long_is_not_run(tmp_path, config_alone):
    path = write(tmp_path / "ids.jsonl", [{"prompt": [7] * 900, "max_tokens": 50}] * 3)
    off = run(config_alone, "--prompts", path, "--no-quality", "--json")
    report = AdviceReport.model_validate_json(off.stdout)
    assert (report.sample, report.why_no_quality) == (None, "it was switched off")
    long = run(config_alone, "--prompts", path, "--max-prompt-len", 800, "--json")
    why = AdviceReport.model_validate_json(long.stdout).why_no_quality
    assert why == "no prompt of up to 800 tokens would be compressed; 3 are longer"


def test_what_does_not_go_together_is_refused(tmp_path, config_alone):
    path = write(tmp_path / "log.jsonl", [{"prompt_tokens": 5}])
    for args, said in (
        (("--token-ms", 0), "token_ms=0, .* above 0"),
        (("--recipe", "off"), "compresses nothing"),
        (("--config", '{"ratio": 0.5}'), "sizes come from --budget"),
        (("--kv-cache-dtype", "int3"), "dtype='int3' is not allowed"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(config_alone, "--prompts", path, *args)
    with pytest.raises(ConfigError, match="no such folder"):
        run("no/such-model", "--prompts", path)
