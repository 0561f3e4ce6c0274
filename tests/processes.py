# SPDX-License-Identifier: Apache-2.0
"""Runs scripts and `vllm` commands in processes of their own."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
# As fork_server.py answers; it is not imported, because it imports vLLM.
RUNNING = 1000


def run_script(script: str, case: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What `script` prints last, read as JSON; from scratch.

    Args:
        script: Python source; the tests' helpers can be imported, `sys.argv[1]` is the case.
        case: Handed over as JSON.
        environment: Of the process; this one's by default.
    """
    with _as_file(script) as path:
        result = subprocess.run(
            [sys.executable, str(path), json.dumps(case)],
            env=_with_helpers(environment),
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    return _last_line(result.stdout)


def fork_script(script: str, case: Any, environment: Mapping[str, str] | None = None) -> Any:
    """As `run_script`, in a fork of a process that has imported vLLM in that environment."""
    with _as_file(script) as path:
        return fork_file(path, [json.dumps(case)], environment)


def fork_file(
    path: Path, arguments: list[str], environment: Mapping[str, str] | None = None
) -> Any:
    """As `fork_script`, for a file of Python with arguments of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        status = fork([str(path), *arguments], out, err, environment).wait()
        assert status == 0, err.read_text(errors="replace")[-4000:]
        return _last_line(out.read_text())


def fork_vllm(arguments: list[str], log: Path) -> int:
    """Exit status of `vllm ARGUMENTS...`; killed by a signal, its negative number.

    Args:
        arguments: As in a shell.
        log: File for everything that it prints.
    """
    return fork(["vllm", *arguments], log, log).wait()


def fork(
    argv: list[str],
    out: Path,
    err: Path,
    environment: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> "Fork":
    """Starts a command in a fork of a process that has imported vLLM, in a session of its own.

    Args:
        argv: "vllm" or a file of Python, and its arguments.
        out: File for what it prints; `err` for its errors.
        environment: Of the process; this one's by default.
        variables: Added to it after the fork: no import of vLLM may depend on them.
    """
    found = _with_helpers(environment)
    # pytest names the test here.
    found.pop("PYTEST_CURRENT_TEST", None)
    server = _fork_server(tuple(sorted(found.items())))
    order = {"argv": argv, "out": str(out), "err": str(err), "variables": dict(variables or {})}
    return Fork(server, server.ask(order))


class Fork:
    """What callers use of subprocess.Popen, of a process that another one has started."""

    def __init__(self, server: "_ForkServer", pid: int) -> None:
        self._server = server
        self._status: int | None = None
        self.pid = pid

    def poll(self) -> int | None:
        return self._ended(blocks=False)

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._ended(blocks=deadline is None)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout or 0)
            time.sleep(0.05)
        return status

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def _ended(self, blocks: bool) -> int | None:
        if self._status is None:
            status = self._server.ask({"wait": self.pid, "blocks": blocks})
            self._status = None if status == RUNNING else status
        return self._status


class _ForkServer:
    """A process that has imported vLLM, and forks."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "fork_server.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.communicate)

    def ask(self, order: dict[str, Any]) -> int:
        """The number it answers."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        # The answer follows whatever the imports have printed.
        for line in self._process.stdout:
            if line.strip().lstrip("-").isdigit():
                return int(line)
        raise AssertionError(f"the process that forks has ended, and did not do {order}")


@cache
def _fork_server(environment: tuple[tuple[str, str], ...]) -> _ForkServer:
    """One for each environment, because imports depend on it."""
    return _ForkServer(dict(environment))


@contextmanager
def _as_file(script: str) -> Iterator[Path]:
    """A file, because worker processes that are spawned import it again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.py"
        path.write_text(script)
        yield path


def _with_helpers(environment: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(os.environ if environment is None else environment)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), found.get("PYTHONPATH"))))
    return found


def _last_line(printed: str) -> Any:
    """The last one that is JSON: vLLM may have something to say as it ends."""
    for line in reversed(printed.splitlines()):
        with suppress(ValueError):
            return json.loads(line)
    raise AssertionError(f"no line of JSON was printed:\n{printed[-4000:]}")
