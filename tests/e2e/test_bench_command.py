# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmark, which rebuilds the arguments of its engine, runs with compression."""

from collections.abc import Callable
from pathlib import Path


def test_bench_throughput(
    run_command: Callable[[list[str], Path], int], models: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    argv = ["vllm", "bench", "throughput", "--model", str(models / "random-llama")]
    argv += ["--max-model-len", "512", "--num-prompts", "2"]
    argv += ["--random-input-len", "300", "--random-output-len", "4"]
    argv += ["--kv-compression", "ems", "--kv-compression-config", '{"budget": 32}']
    status = run_command(argv, log)
    text = log.read_text()
    assert status == 0, text[-4000:]
    assert "Total num output tokens:  8" in text
