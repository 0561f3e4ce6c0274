# SPDX-License-Identifier: Apache-2.0
"""Runs tests on a GPU so that one that hangs, or breaks the process, costs its file alone.

Usage: python benchmarks/gpu/run_tests.py PATHS... [--limit SECONDS] [--junitxml FILE] [-k NAMES]

Every file of tests runs in a process of its own, several at a time: after a fault of one kernel
the GPU serves no other call of its process. The exit code is 0 where all passed, 124 where a file
reached the limit, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import limited

PROCESSES = 8
LIMIT_S = 100
NO_TESTS = 5
# After so long a test prints where it is.
_SLOW_S = 30


def files_of(paths: Sequence[Path], ignored: Sequence[Path]) -> list[Path]:
    """Files of tests, those in folders too."""
    found = [
        file
        for path in paths
        for file in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])
    ]
    left_out = {path.resolve() for path in ignored}
    return [file for file in found if file.resolve() not in left_out]


def run_file(file: Path, log: Path, options: argparse.Namespace) -> int:
    """Run a file's tests into a log and, beside it, an XML file; the exit code."""
    command = [sys.executable, "-m", "pytest", str(file), "-v", "--tb", "short"]
    command += [
        "-p",
        "no:cacheprovider",
        "-m",
        options.mark,
        "--junitxml",
        str(log.with_suffix(".xml")),
    ]
    command += ["-o", f"faulthandler_timeout={_SLOW_S}", *(["-k", options.k] if options.k else [])]
    with log.open("w") as sink:
        return limited.run(command, options.limit, stdout=sink, stderr=subprocess.STDOUT)


def merged(files: Sequence[Path], logs: Sequence[Path]) -> ElementTree.Element:
    """The results of all files; one that left none counts as an error."""
    root = ElementTree.Element("testsuites")
    for file, log in zip(files, logs, strict=True):
        try:
            root.extend(ElementTree.parse(log.with_suffix(".xml")).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            counts = {"tests": "1", "errors": "1", "failures": "0", "skipped": "0"}
            suite = ElementTree.SubElement(root, "testsuite", counts, name=str(file))
            case = ElementTree.SubElement(suite, "testcase", classname=str(file), name="all")
            ElementTree.SubElement(case, "error", message="it left no results")
    return root


def say(
    files: Sequence[Path], logs: Sequence[Path], running: Sequence[Future[int]], xml: Path | None
) -> None:
    """Print what the files' tests wrote, those that failed last, and write the XML file."""
    if xml:
        ElementTree.ElementTree(merged(files, logs)).write(xml)
    codes = [future.result() if future.done() else limited.TIMED_OUT for future in running]
    failed = [code not in (0, NO_TESTS) for code in codes]
    for _, log in sorted(zip(failed, logs, strict=True)):
        with contextlib.suppress(FileNotFoundError):
            print(log.read_text(errors="replace"), flush=True)
    for file, code in zip(files, codes, strict=True):
        if code not in (0, NO_TESTS):
            print(f"{file}: {'HANGS' if code == limited.TIMED_OUT else 'FAILED'}", flush=True)


def exit_code(codes: Sequence[int]) -> int:
    """Of all files together; one without tests is no failure where another has some."""
    if limited.TIMED_OUT in codes:
        return limited.TIMED_OUT
    return 0 if 0 in codes and set(codes) <= {0, NO_TESTS} else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--ignore", type=Path, nargs="+", default=[])
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds per file")
    parser.add_argument("--junitxml", type=Path)
    parser.add_argument("--mark", default="gpu", help="pytest's -m")
    parser.add_argument("-k", help="as pytest's")
    options = parser.parse_args()
    files = files_of(options.paths, options.ignore)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{number}.log" for number in range(len(files))]
        pool = ThreadPoolExecutor(PROCESSES)
        running = [
            pool.submit(run_file, file, log, options) for file, log in zip(files, logs, strict=True)
        ]
        try:
            wait(running)
        except KeyboardInterrupt:
            say(files, logs, running, options.junitxml)
            # Without waiting for the threads; whoever interrupts ends what they started.
            os._exit(1)
        say(files, logs, running, options.junitxml)
    return exit_code([future.result() for future in running])


if __name__ == "__main__":
    sys.exit(main())
