# SPDX-License-Identifier: Apache-2.0
"""Runs commands in forks of one process, which has imported vLLM already.

Reads one order a line from stdin, as JSON, and answers each with one line, a number:
{"argv": [...], "out": FILE, "err": FILE, "variables": {...}}, where argv[0] is "vllm" or a file of
Python, starts a process in a session of its own, with these variables in its environment, and is
answered with its id; {"wait": PID, "blocks": true or false} with its exit status, negative where a
signal killed it, or with RUNNING.

A process that does little spends nearly all of its time on imports, ten seconds or, with Triton,
twenty.
"""

import gc
import importlib
import json
import os
import runpy
import sys
from contextlib import redirect_stdout, suppress
from typing import Any

import vllm.entrypoints.cli.main as cli

# No exit status.
RUNNING = 1000
# What an engine imports when it starts.
ENGINE = (
    "vllm.entrypoints.llm",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.model_loader.default_loader",
)


def preload() -> None:
    """Import what commands import; of the command line and its server, by asking it for help."""
    sys.argv = ["vllm", "serve", "--help"]
    with redirect_stdout(sys.stderr), suppress(SystemExit):
        cli.main()
    for name in ("vllm.entrypoints.launchers.api_server.entry", *ENGINE):
        importlib.import_module(name)
    # What is there now is not to be copied and collected by every fork as it ends.
    gc.collect()
    gc.freeze()


def start(argv: list[str], out: str, err: str, variables: dict[str, str]) -> int:
    """Id of the process of a command."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.environ.update(variables)
        for name, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = argv
        if argv[0] == "vllm":
            sys.exit(cli.main())
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit()
    return pid


def wait(pid: int, blocks: bool) -> int:
    """Its exit status."""
    ended, status = os.waitpid(pid, 0 if blocks else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else RUNNING


def answer(order: dict[str, Any]) -> int:
    return start(**order) if "argv" in order else wait(order["wait"], order["blocks"])


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
