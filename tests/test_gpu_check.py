# SPDX-License-Identifier: Apache-2.0
"""The GPU check, as far as a machine without a GPU can try it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
from gpu import limited, machine
from gpu.stages import STAGES, Stage
from gpu.summary import FAILED, PASSED, SKIPPED, TIMED_OUT, Outcome, details_of, exit_code, table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_dry_run_names_every_stage_and_does_nothing(tmp_path):
    done = run_check("--dry-run", "--out", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert f"{stage.name} " in done.stdout
    assert not (tmp_path / "results").exists()


def test_stages_are_chosen_by_name_and_kept_in_order():
    assert gpu_check.chosen(None) == list(STAGES)
    assert [stage.name for stage in gpu_check.chosen(["bench", "smoke"])] == ["smoke", "bench"]
    # Nothing that was packed runs before the extension is in place.
    names = [stage.name for stage in gpu_check.chosen(["packages", "smoke"])]
    assert names == ["packages", "build", "smoke"]


def test_what_stages_run_exists():
    for stage in STAGES:
        added = [part for _, arguments in stage.after_hang for part in arguments]
        scripts = [part for part in stage.command if part.endswith(".py") or "tests/" in part]
        assert scripts, stage.name
        for part in scripts + [part for part in added if "/" in part]:
            assert (ROOT / part).exists(), part


def test_a_stage_names_only_earlier_ones():
    before: set[str] = set()
    for stage in STAGES:
        assert {name for name, _ in stage.after_hang} | set(stage.not_after_hang) <= before
        before.add(stage.name)


def test_results_are_few_files_in_one_folder():
    """A machine that is lent brings back no more than eight."""
    files = {"check.json", "check.log", *(name for stage in STAGES for name in stage.writes)}
    assert len(files) <= 8


def script(tmp_path: Path, text: str, **changes: object) -> Stage:
    path = tmp_path / "stage.py"
    path.write_text(text)
    stage = Stage("stage", "a test", ("{python}", str(path), "{out}"), limit_s=60, needs_gpu=False)
    return replace(stage, **changes)


def outcome_of(stage: Stage, tmp_path: Path, seconds: float = 60) -> Outcome:
    env = gpu_check.environment()
    _, outcomes = gpu_check.check([stage], tmp_path / "out", sys.executable, seconds, env)
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert [found["status"] for found in written["stages"]] == [outcomes[0].status]
    assert written["passed"] == (outcomes[0].status == PASSED)
    assert written["machine"]["python"]
    return outcomes[0]


def test_a_stage_passes_or_fails_by_its_exit_code(tmp_path, capsys, monkeypatch):
    assert outcome_of(script(tmp_path, "print('fine')"), tmp_path).status == PASSED
    assert "fine" in (tmp_path / "out" / "check.log").read_text()
    monkeypatch.setattr(machine, "describe", lambda *args: {"capability": None, "python": "3"})
    assert outcome_of(script(tmp_path, "raise SystemExit('wrong')"), tmp_path).status == FAILED
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "seconds", "reason"),
    [
        ({"needs_gpu": True}, 60, "no GPU"),
        ({"tool": "no-such-tool"}, 60, "no no-such-tool"),
        ({}, 1, "no time left"),
    ],
)
def test_a_stage_that_cannot_run_says_why(tmp_path, monkeypatch, changes, seconds, reason):
    monkeypatch.setattr(machine, "describe", lambda *args: {"capability": None, "python": "3"})
    outcome = outcome_of(script(tmp_path, "", **changes), tmp_path, seconds)
    assert (outcome.status, outcome.details) == (SKIPPED, reason)


def test_what_hung_is_not_waited_for_again(tmp_path, monkeypatch):
    """A second stage gets other arguments, a third is left out."""
    monkeypatch.setattr(machine, "describe", lambda *args: {"capability": None, "python": "3"})
    monkeypatch.setattr(limited, "GRACE_S", 1)
    hangs = script(tmp_path, "import time; time.sleep(600)", name="first", limit_s=1)
    told = Stage(
        "second",
        "a test",
        ("{python}", "-c", "import sys; sys.exit(sys.argv[1:] != ['--without'])"),
        limit_s=60,
        needs_gpu=False,
        after_hang=(("first", ("--without",)),),
    )
    left_out = replace(told, name="third", not_after_hang=("first",))
    env = gpu_check.environment()
    stages = [hangs, told, left_out]
    _, outcomes = gpu_check.check(stages, tmp_path / "out", sys.executable, 60, env)
    assert [found.status for found in outcomes] == [TIMED_OUT, PASSED, SKIPPED]
    assert outcomes[2].details == "first hung"
    _, outcomes = gpu_check.check(stages[1:], tmp_path / "out", sys.executable, 60, env)
    assert [found.status for found in outcomes] == [FAILED, FAILED]


def test_only_everything_passed_is_success():
    passed = Outcome("a", PASSED, 1.0)
    assert exit_code([passed, passed]) == 0
    for status in (FAILED, TIMED_OUT, SKIPPED):
        assert exit_code([passed, Outcome("b", status, 1.0)]) == 1
    assert exit_code([]) == 1


def test_table_of_made_up_results():
    found = {"gpu": "A GPU", "driver": "580", "torch": "2.11.0", "commit": "abc", "vllm": None}
    text = table(found, [Outcome("build", PASSED, 31.5, "fine"), Outcome("bench", SKIPPED, 0.0)])
    assert text.splitlines()[0] == "A GPU; driver 580, torch 2.11.0; commit abc"
    assert "build      passed       31.5  fine" in text
    assert text.endswith("NOT PASSED")


def test_what_stages_wrote_is_summed_up(tmp_path):
    line = {"provider": "ems_vllm", "length": 32768, "num_rows": 1, "of_target": 1.2}
    lines = [line, {**line, "of_target": 0.9}, {**line, "of_target": None}, {**line, "length": 4}]
    (tmp_path / "ops.json").write_text(json.dumps({"lines": lines}))
    assert details_of("bench", tmp_path) == "4 timings; at 32k, 1 of 2 targets met"
    builds = {"shipped": [{"p50_ms": 1.5}, {"p50_ms": 9.0}], "other": None}
    (tmp_path / "variants.json").write_text(json.dumps({"builds": builds}))
    assert details_of("variants", tmp_path) == "shipped 1.50 ms, other failed"
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>'
    )
    assert details_of("tests", tmp_path) == "9 tests, 2 failed, 2 skipped"
    assert "cannot be read" in details_of("graphs", tmp_path)
    assert details_of("build", tmp_path) == ""


@pytest.mark.parametrize(
    ("capability", "arch"), [([8, 0], "8.0"), ([8, 9], "8.9"), ([9, 0], "9.0a"), ([10, 0], "10.0a")]
)
def test_the_extension_is_built_for_the_gpu_there(capability, arch):
    assert machine.arch_of(capability) == arch


def test_operators_exercised_for_the_sanitizer_are_correct():
    command = [sys.executable, "benchmarks/gpu/exercise.py", "--device", "cpu"]
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run([*command, "--only", tool], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_machine_is_described_although_torch_does_not_answer(tmp_path, monkeypatch):
    """By nvidia-smi; and a tool that hangs is not waited for."""
    smi, python = tmp_path / "nvidia-smi", tmp_path / "python"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 580.159.04'\n")
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    for path in (smi, python):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(machine, "_TORCH_S", 0.5)
    monkeypatch.setattr(machine, "_TOOL_S", 0.5)
    found = machine.describe(str(python), {})
    assert (found["gpu"], found["capability"]) == ("NVIDIA H100 80GB HBM3", [9, 0])
    assert found["driver"] == "580.159.04"
    assert "torch" not in found
