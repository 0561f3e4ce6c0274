# SPDX-License-Identifier: Apache-2.0
"""Runs `vllm` commands in forks of one process, which has imported vLLM already.

Reads one command per line from stdin, as JSON: {"argv": [...], "log": FILE for stdout and stderr}.
Answers each with its exit status. A command that fails early spends nearly all of its ten seconds
on imports, so a dozen of them would take minutes.
"""

import gc
import json
import os
import sys
from contextlib import redirect_stdout, suppress

import vllm.entrypoints.cli.main as cli


def preload() -> None:
    """Import what the command imports, by running it: the parser, then the server."""
    sys.argv = ["vllm", "serve", "--help"]
    with redirect_stdout(sys.stderr), suppress(SystemExit):
        cli.main()
    import vllm.entrypoints.launchers.api_server.entry  # noqa: F401

    # What is there now is not to be copied and collected by every fork as it ends.
    gc.freeze()


def run(argv: list[str], log: str) -> int:
    """Exit status of one command, killed by a signal: its negative number."""
    pid = os.fork()
    if pid == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = argv
        sys.exit(cli.main())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
