# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm doctor` beside a server that runs: what it said before, and what it says now."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from e2e.clients import complete, prompt
from e2e.conftest import WITH_PAGE
from processes import fork_script
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.eval.server import block_pool
from ems_vllm.eval.server.process import Server

EXAMINE = """
import json, os, sys
from ems_vllm.doctor.start.examine import examine

# In the environment of the server, which has the status page.
model, arguments, variables = json.loads(sys.argv[1])
os.environ.update(variables)
print(examine([model, *arguments]).model_dump_json())
"""


def watch(server: Server, seconds: float) -> dict[str, Any]:
    args = ["doctor", "--url", server.url, "--seconds", str(seconds), "--json"]
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_before_the_start_it_says_what_the_log_then_says(server: Server) -> None:
    # `vllm serve MODEL --port N` and what was given.
    model, arguments = server.command[2], server.command[5:]
    report = fork_script(EXAMINE, [model, arguments, WITH_PAGE])
    assert report["status"] == "ok"
    log, capacity = server.log(), report["capacity"]
    fit = re.search(
        r"fit: ([\d.]+) dense \((\d+) blocks each\), ([\d.]+) compressed \((\d+) blocks each", log
    )
    assert fit is not None
    dense, dense_blocks, compressed, compressed_blocks = map(float, fit.groups())
    assert (int(capacity["dense"]), int(capacity["compressed"])) == (dense, compressed)
    assert capacity["dense_blocks"] == dense_blocks
    assert capacity["compressed_blocks"] == compressed_blocks
    beside = re.search(r"beside the cache ([\d.]+) MiB .*? ([\d.]+) MiB .*? ([\d.]+) MiB", log)
    assert beside is not None
    assert abs(capacity["beside_bytes"] / 2**20 - sum(map(float, beside.groups()))) < 0.2


def test_a_server_that_compresses_says_so(server: Server) -> None:
    complete(server, prompt(900, seed=21), 8)
    report = watch(server, 0.2)
    assert report["regime"] == "idle"
    assert report["helps"] == "on"
    assert report["compressing"]["requests"]["compressed"] >= 1
    assert report["compressing"]["compactions"] >= 1
    assert report["compressing"]["compaction_s"] > 0
    assert report["compressing"]["saved_bytes"] == 0


def test_requests_that_wait_for_blocks_are_noticed(start_server: Any) -> None:
    """Of requests that fill more than half the pool each, one runs and the others wait."""
    memory = str(130 * 16 * 4 * 4 * 64 * 2 * 4)
    with (
        start_server(
            "random-llama", "--max-model-len", "2048", "--kv-cache-memory-bytes", memory
        ) as running,
        ThreadPoolExecutor(4) as threads,
    ):
        complete(running, prompt(1500, seed=0), 2)
        answers = [
            threads.submit(complete, running, prompt(1500, seed), 200) for seed in range(1, 5)
        ]
        while not block_pool.read(running.url).num_waiting:
            assert not all(answer.done() for answer in answers)
            time.sleep(0.05)
        report = watch(running, 1.0)
        for answer in answers:
            answer.result()
    assert report["regime"] == "kv_bound"
    assert report["helps"] == "yes"
    assert report["traffic"]["waiting"] >= 1
    assert report["gain"]["dense_fit"] == 1
