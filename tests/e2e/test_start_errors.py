# SPDX-License-Identifier: Apache-2.0
"""A mistake in the settings stops `vllm serve` with one sentence: key, value, remedy."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FORK_CLI = Path(__file__).with_name("fork_cli.py")
NGRAM = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'


@pytest.fixture(scope="module")
def fork_cli() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(FORK_CLI)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    ("args", "key_and_value", "remedy"),
    [
        pytest.param(
            ["--kv-compression", "bogus"],
            "kv_compression='bogus' is not a recipe",
            "use off, ems,",
            id="unknown recipe",
        ),
        pytest.param(
            ["--kv-compression", "no-such.yaml"],
            "kv_compression='no-such.yaml' cannot be read",
            "give the path of a YAML file",
            id="missing recipe file",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", '{"bugdet": 1}'],
            "kv_compression_config.bugdet=1 is not a setting",
            "use 'budget'",
            id="unknown key",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", '{"budget": 0}'],
            "kv_compression_config.budget=0 is not allowed",
            "greater than or equal to 1",
            id="out of range",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", '{"budget": 64'],
            "kv_compression_config='{\"budget\": 64' is not valid JSON",
            "quote the whole object and its keys",
            id="bad JSON",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-compression-config", "no-such.yaml"],
            "kv_compression_config='no-such.yaml' cannot be read",
            "give the path of a YAML file",
            id="missing settings file",
        ),
        pytest.param(
            ["--kv-compression-config", '{"budget": 64}'],
            "kv_compression_config={'budget': 64} has no effect",
            "choose a recipe",
            id="settings without a recipe",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--speculative-config", NGRAM],
            "speculative_config='ngram' cannot be combined with kv_compression='ems'",
            "drop --speculative-config",
            id="speculative decoding",
        ),
        pytest.param(
            ["--kv-compression", "ems", "--kv-cache-dtype", "fp8"],
            "kv_cache_dtype='fp8' cannot be combined with kv_compression='ems'",
            "use --kv-cache-dtype auto",
            id="fp8 cache",
        ),
    ],
)
def test_one_sentence_says_what_to_change(
    fork_cli: subprocess.Popen[str],
    models: Path,
    tmp_path: Path,
    args: list[str],
    key_and_value: str,
    remedy: str,
) -> None:
    log = tmp_path / "log.txt"
    argv = ["vllm", "serve", str(models / "ems-tiny"), *args]
    fork_cli.stdin.write(json.dumps({"argv": argv, "log": str(log)}) + "\n")
    fork_cli.stdin.flush()
    # The answer follows whatever the imports have printed.
    status = next(int(line) for line in fork_cli.stdout if line.strip().lstrip("-").isdigit())
    lines = log.read_text().strip().splitlines()
    assert status != 0, "\n".join(lines)
    sentence = lines[-1]
    assert key_and_value in sentence
    assert remedy in sentence
    assert sentence.endswith(".")
