# SPDX-License-Identifier: Apache-2.0
"""A stage of the GPU check that hangs costs its own time and nothing else."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu import limited
from gpu.stages import Stage
from gpu.summary import FAILED, PASSED, TIMED_OUT

pytestmark = pytest.mark.slow

# Starts a child in its group, one in a session of its own, and one whose parent is gone; writes
# down their process ids.
CHILDREN = """
import pathlib, subprocess
sleep = ["sleep", "600"]
pids = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
orphan = "setsid sleep 600 > /dev/null & echo $!"
pids.append(int(subprocess.check_output(orphan, shell=True)))
pathlib.Path("pids").write_text(" ".join(map(str, pids)))
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(limited, "GRACE_S", 1)


def run(text: str, folder: Path, limit_s: float = 60) -> tuple[int, str]:
    """Exit code and output of a script that runs in a folder."""
    log = folder / "log"
    with log.open("w") as sink:
        command = [sys.executable, "-X", "faulthandler", "-c", text]
        code = limited.run(command, limit_s, cwd=folder, stdout=sink, stderr=subprocess.STDOUT)
    return code, log.read_text()


def is_alive(pid: str) -> bool:
    status = Path("/proc", pid, "status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_exit_code_is_the_commands(tmp_path):
    assert run("print('fine')", tmp_path) == (0, "fine\n")
    assert run("raise SystemExit(3)", tmp_path)[0] == 3
    assert run("import os; os.abort()", tmp_path)[0] not in (0, limited.TIMED_OUT)


def test_a_command_that_is_not_there_fails(tmp_path):
    assert limited.run([str(tmp_path / "missing")], 60, stderr=subprocess.DEVNULL) == 127


@pytest.mark.parametrize("end", ["", "import time; time.sleep(600)"], ids=["ends", "hangs"])
def test_nothing_that_it_started_stays(tmp_path, end):
    code, _ = run(CHILDREN + end, tmp_path, limit_s=5 if end else 60)
    assert code == (limited.TIMED_OUT if end else 0)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 3
    assert not any(map(is_alive, pids))


def test_what_it_writes_when_interrupted_stays(tmp_path):
    text = """
import pathlib, time
try:
    time.sleep(600)
finally:
    pathlib.Path("results").write_text("half")
"""
    assert run(text, tmp_path, limit_s=3)[0] == limited.TIMED_OUT
    assert (tmp_path / "results").read_text() == "half"


def test_one_that_ignores_the_interruption_says_where_it_hangs(tmp_path):
    text = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
def waits_for_ever():
    time.sleep(600)
waits_for_ever()
"""
    code, said = run(text, tmp_path, limit_s=3)
    assert code == limited.TIMED_OUT
    assert "in waits_for_ever" in said


def test_stopping_whoever_waits_ends_it_too(tmp_path):
    command = [sys.executable, "-c", CHILDREN + "import time; time.sleep(600)"]
    benchmarks = Path(limited.__file__).parents[1]
    text = f"import sys; sys.path.insert(0, {str(benchmarks)!r}); from gpu import limited; "
    # Whoever runs the tests in the background of a shell has it ignored.
    text += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    text += f"limited.run({command!r}, 600)"
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    pids = tmp_path / "pids"
    while process.poll() is None and not (pids.exists() and pids.read_text().count(" ") == 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not any(map(is_alive, pids.read_text().split()))


def test_stages_after_one_that_hangs_are_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.machine, "describe", lambda *args: {"capability": None})
    ignores = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    texts = {"hangs": ignores, "fails": "raise SystemExit(1)", "passes": ""}
    stages = [
        Stage(name, "a test", ("{python}", "-c", text), limit_s=1 if text is ignores else 60,
              needs_gpu=False)
        for name, text in texts.items()
    ]  # fmt: skip
    env = gpu_check.environment()
    _, outcomes = gpu_check.check(stages, tmp_path, sys.executable, 60, env)
    assert [found.status for found in outcomes] == [TIMED_OUT, FAILED, PASSED]
    assert (tmp_path / "check.json").is_file()
