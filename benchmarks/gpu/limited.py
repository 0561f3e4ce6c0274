# SPDX-License-Identifier: Apache-2.0
"""Runs a command for so long at most, and ends everything that it started.

Usage: python benchmarks/gpu/limited.py [--grace SECONDS] SECONDS COMMAND...

A command that reaches its limit is interrupted, as by Ctrl-C, so that it may write down what it
has; if that does not end it, it is aborted, upon which a Python with PYTHONFAULTHANDLER=1 prints
where it hangs, and killed. Then, and also after a command that ended by itself, every process that
it started is killed, whatever session it has moved to. The exit code is the command's, TIMED_OUT
after an interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMED_OUT = 124
# From the interruption to the abortion.
GRACE_S = 10
# A process that waits for a GPU may take long to go, or stay.
_LAST_S = 5
_SUBREAPER = 36


def run(command: Sequence[str], limit_s: float, **popen: Any) -> int:
    """Run a command in a process that does what is said above; its exit code.

    Takes no longer than the limit, GRACE_S and some seconds more, whatever the command does.

    Args:
        popen: Further arguments of subprocess.Popen, for both processes.
    Raises:
        OSError: the command cannot be started from its folder.
    """
    guard = [sys.executable, "-I", str(Path(__file__).resolve()), "--grace", str(GRACE_S)]
    guard += [str(limit_s), *command]
    process = subprocess.Popen(guard, start_new_session=True, **popen)
    try:
        return process.wait(limit_s + GRACE_S + 3 * _LAST_S)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        # Also when this process is interrupted.
        process.terminate()
        try:
            process.wait(2 * _LAST_S)
        except subprocess.TimeoutExpired:
            process.kill()


def descendants(pid: int) -> Iterator[int]:
    """Processes that a process has started, and theirs; not those that have ended."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name before it, in brackets, may hold anything.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    waiting = [pid]
    while waiting:
        found = children.get(waiting.pop(), [])
        yield from found
        waiting += found


def _kill_descendants() -> None:
    """All of this process; new ones may come while one looks."""
    deadline = time.monotonic() + _LAST_S
    while (pids := list(descendants(os.getpid()))) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Interrupt a process, then abort it."""
    for number, seconds in ((signal.SIGINT, grace_s), (signal.SIGABRT, 1)):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, help="from interruption to abortion"
    )
    parser.add_argument("limit", type=float, help="seconds")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    # Orphans come to this process, so that it finds them.
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Shells start what runs in the background with interruptions ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        process = subprocess.Popen(options.command, start_new_session=True)
        try:
            code = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            _end(process, options.grace)
            return TIMED_OUT
        return code if code >= 0 else 128 - code
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    finally:
        _kill_descendants()


if __name__ == "__main__":
    sys.exit(main())
