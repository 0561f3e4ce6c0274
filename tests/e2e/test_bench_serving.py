# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark runs, and what it reports about blocks is what the plan promises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_serving import Settings

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def report(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "serving.json"
    command = [sys.executable, "benchmarks/bench_serving.py", "--quick", "--cases", "ample"]
    result = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "steady blocks per request" in result.stdout
    return json.loads(out.read_text())


def test_report_is_complete(report: dict[str, Any]) -> None:
    assert [(run["case"], run["recipe"]) for run in report["runs"]] == [
        ("ample", "dense"),
        ("ample", "ems"),
    ]
    assert {"commit", "vllm", "torch", "ems-vllm", "cpu", "gpu"} <= set(report["environment"])
    assert report["command"].startswith("python benchmarks/bench_serving.py --quick")
    for run in report["runs"]:
        assert run["num_preemptions"] == 0
        assert run["output_tokens_per_s"] > 0
        assert 0 < run["ttft_s"]["median"] <= run["ttft_s"]["p95"] <= run["wall_s"]
        assert 0 < run["tpot_ms"]["median"] <= run["tpot_ms"]["p95"]
        assert run["peak_blocks"] == max(run["timeline"]["used_blocks"]) <= run["num_blocks"]
        assert len({len(values) for values in run["timeline"].values()}) == 1
    (ratio,) = report["ratios"]
    dense, ems = report["runs"]
    assert ratio["peak_blocks"] == pytest.approx(
        ems["peak_blocks"] / dense["peak_blocks"], abs=1e-3
    )


def test_compressed_requests_stay_within_the_plan(report: dict[str, Any]) -> None:
    dense, ems = report["runs"]
    settings = report["settings"]
    assert dense["steady_blocks_per_request"] >= settings["prompt_len"] / BLOCK_SIZE
    # The defaults of recent_window and recompress_interval; one column begun.
    assert ems["steady_blocks_per_request"] <= (settings["budget"] + 64 + 256) / BLOCK_SIZE + 1


def test_figure_is_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, figure = tmp_path / "serving.json", tmp_path / "serving.svg"
    source.write_text(json.dumps(report))
    command = [sys.executable, "benchmarks/plot_serving.py", str(source), str(figure)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert figure.read_text().lstrip().startswith("<?xml")


def test_float8_pools_have_as_many_bytes() -> None:
    settings = Settings(
        model="", itemsize=2, num_prompts=8, prompt_len=2000, num_new_tokens=96, budget=448,
        config={}, num_tight=2, interval_s=1, seed=0, server_args=["--seed", "1"],
    )  # fmt: skip
    # Two requests of 131 blocks, and vLLM's null block, which holds nothing.
    for case, num_blocks in (("tight", 262), ("ample", 1048)):
        dense, float8 = (settings.arguments(case, name) for name in ("dense", "dense+fp8"))
        assert dense[5] == str(num_blocks + 1)
        assert float8[5] == str(2 * num_blocks + 1)
        assert float8[6:] == [*dense[6:], "--kv-cache-dtype", "fp8"]
        compressed = settings.arguments(case, "ems+fp8")
        assert compressed[: len(float8)] == float8
        assert compressed[len(float8) :][:2] == ["--kv-compression", "ems"]
