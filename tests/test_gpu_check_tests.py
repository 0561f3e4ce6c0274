# SPDX-License-Identifier: Apache-2.0
"""Tests that hang or crash on a GPU machine cost their own file alone."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from gpu import limited, run_tests

pytestmark = pytest.mark.slow

SCRIPT = Path(run_tests.__file__)
FILES = {
    "test_passes.py": "def test_a(): pass\ndef test_b(): pass",
    "test_fails.py": "def test_a(): assert 1 == 2",
    "test_crashes.py": "import os\ndef test_a(): os.abort()",
    "test_hangs.py": "import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)",
    "test_none.py": "",
}


def run(folder: Path, *names: str, limit: float = 120) -> tuple[int, dict[str, int], str]:
    """Exit code, sums of the XML file, and output."""
    for name in names:
        (folder / name).write_text(FILES[name])
    report = folder / "report.xml"
    command = [sys.executable, str(SCRIPT), str(folder), "--junitxml", str(report)]
    # Marks are this repository's; here every test is meant.
    command += ["--mark", "not gpu", "--limit", str(limit)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    suites = list(ElementTree.parse(report).getroot())
    keys = ("tests", "failures", "errors")
    sums = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in keys}
    return done.returncode, sums, done.stdout


def test_all_pass(tmp_path):
    code, sums, _ = run(tmp_path, "test_passes.py", "test_none.py")
    assert (code, sums) == (0, {"tests": 2, "failures": 0, "errors": 0})


def test_no_test_at_all_is_a_failure(tmp_path):
    assert run(tmp_path, "test_none.py")[0] == 1


def test_a_crash_leaves_the_results_of_other_files(tmp_path):
    code, sums, said = run(tmp_path, "test_passes.py", "test_fails.py", "test_crashes.py")
    assert (code, sums) == (1, {"tests": 4, "failures": 1, "errors": 1})
    assert "test_crashes.py: FAILED" in said
    assert "assert 1 == 2" in said


def test_a_hang_is_named(tmp_path):
    code, sums, said = run(tmp_path, "test_passes.py", "test_hangs.py", limit=8)
    assert code == limited.TIMED_OUT
    assert sums["tests"] >= 3
    assert "test_hangs.py: HANGS" in said


def test_an_interruption_leaves_the_results_so_far(tmp_path):
    for name in ("test_passes.py", "test_hangs.py"):
        (tmp_path / name).write_text(FILES[name])
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--mark", "not gpu"]
    command += ["--junitxml", str(tmp_path / "report.xml")]
    assert limited.run(command, 8, stdout=subprocess.DEVNULL) == limited.TIMED_OUT
    suites = list(ElementTree.parse(tmp_path / "report.xml").getroot())
    assert sorted(int(suite.get("tests")) for suite in suites) == [1, 2]
    assert sorted(int(suite.get("errors")) for suite in suites) == [0, 1]


@pytest.mark.parametrize(
    ("codes", "expected"), [([0, 5], 0), ([5], 1), ([0, 2], 1), ([0, 1, 124], 124)]
)
def test_exit_codes(codes, expected):
    assert run_tests.exit_code(codes) == expected
