# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process: of the evaluation, the serving benchmark and the end-to-end tests."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

# Beside this Python first: a PATH may lead to another installation.
VLLM = shutil.which("vllm", path=str(Path(sys.executable).parent)) or "vllm"
_TAIL = 6000


class Process(Protocol):
    """What is used of subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Server:
    """Runs `vllm serve MODEL ARGS...` while its context is open.

    Args:
        model: As the first argument of `vllm serve`.
        args: Further arguments, without a port.
        log_path: File for everything the server prints.
        timeout: Seconds until it must answer.
    """

    def __init__(
        self, model: str, args: Sequence[str], log_path: Path, timeout: float = 300
    ) -> None:
        self.model = model
        self.port = _free_port()
        self.command = [VLLM, "serve", model, "--port", str(self.port), *args]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_path = log_path
        self._timeout = timeout
        self._process: Process | None = None

    def __enter__(self) -> "Server":
        self._process = self._start(self.command, self._log_path)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    @staticmethod
    def _start(command: list[str], log_path: Path) -> Process:
        """Start it in a session of its own, so that the engine's processes end with it."""
        with log_path.open("wb") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        return self.log()[-_TAIL:]

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server and every process it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise RuntimeError(f"the server did not start:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.2)
        raise TimeoutError(f"no answer after {self._timeout} s:\n{self.log_tail()}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
