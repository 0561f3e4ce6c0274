# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmark, which rebuilds the arguments of its engine, runs with compression."""

from pathlib import Path

from processes import fork_vllm


def test_bench_throughput(models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    argv = ["bench", "throughput", "--model", str(models / "random-llama")]
    argv += ["--max-model-len", "512", "--num-prompts", "2"]
    argv += ["--random-input-len", "300", "--random-output-len", "4"]
    argv += ["--kv-compression", "ems", "--kv-compression-config", '{"budget": 32}']
    status = fork_vllm(argv, log)
    text = log.read_text()
    assert status == 0, text[-4000:]
    assert "Total num output tokens:  8" in text
