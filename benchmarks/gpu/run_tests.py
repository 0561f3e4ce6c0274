# SPDX-License-Identifier: Apache-2.0
"""Runs tests on a GPU so that one that hangs, or breaks the process, costs no more than its file.

Usage: python benchmarks/gpu/run_tests.py [--alone] TESTS... [PYTEST_OPTIONS...]

Every file gets a process of its own where pytest-xdist is there, and a test is stopped after a
minute where pytest-timeout is; its process then begins anew with the next. With --alone neither is
used: a test that hangs stays for gpu_check.py to see.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

PROCESSES = 8
TEST_S = 60


def options(alone: bool) -> list[str]:
    """Of pytest, as far as its plug-ins are there."""
    found = ["-q", "-p", "no:cacheprovider", "-m", "gpu"]
    if alone:
        return found
    if find_spec("xdist"):
        found += ["--numprocesses", str(PROCESSES), "--dist", "loadfile"]
    if find_spec("pytest_timeout"):
        # A signal is not seen by a test that waits for the GPU.
        found += ["--timeout", str(TEST_S), "--timeout-method", "thread"]
    return found


def main() -> int:
    arguments = sys.argv[1:]
    alone = "--alone" in arguments
    return int(pytest.main([*options(alone), *(part for part in arguments if part != "--alone")]))


if __name__ == "__main__":
    sys.exit(main())
