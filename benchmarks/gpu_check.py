# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell, in one command: `make gpu-check`.

    python benchmarks/gpu_check.py --out results [--stages bench serving] [--dry-run]

Builds the extension, runs the operators' GPU tests, CUDA graphs, compute-sanitizer, the benchmark,
and vLLM dense and compressed. Needs an NVIDIA GPU, nvcc, Python with torch, triton and
transformers; no network. What else is needed travels in .gpu/ (`make gpu-pack`); docs/gpu-check.md
says how to go about it where the machine is lent. A stage that fails, or takes longer than its
limit, does not keep the next from running. The exit code is 0 only when every stage passed.

Results: check.json (machine, versions, commit, outcomes), check.log (all output), and what the
stages write. Numbers of a run go to benchmarks/results/ as they are.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

from gpu import limited, machine
from gpu.stages import STAGES, Stage
from gpu.summary import (
    FAILED,
    PASSED,
    SKIPPED,
    TIMED_OUT,
    Outcome,
    details_of,
    exit_code,
    table,
    write,
)

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
# With less left, a stage is not begun: it needs some seconds beside what stopping it may take.
LEAST_S = limited.GRACE_S + 10
TAIL_LINES = 15


def environment() -> dict[str, str]:
    """Of every stage: this checkout and .gpu/'s packages first, no network."""
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": os.pathsep.join([f"{SITE}/bin", os.environ.get("PATH", ""), f"{cuda}/bin"]),
        "PYTHONUNBUFFERED": "1",
        # A stage that hangs is aborted in the end: this says where it was.
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def command_of(stage: Stage, python: str, out: Path, hung: Collection[str] = ()) -> list[str]:
    """The stage's command with its placeholders filled in.

    Args:
        hung: Names of stages that ran into their limits.
    """
    command = [part.format(python=python, out=out) for part in stage.command]
    for name, arguments in stage.after_hang:
        command += arguments if name in hung else ()
    return command


def obstacle(
    stage: Stage, has_gpu: bool, seconds_left: float, hung: Collection[str] = ()
) -> str | None:
    """Why a stage cannot run here.

    Args:
        hung: Names of stages that ran into their limits.
    """
    if stage.needs_gpu and not has_gpu:
        return "no GPU"
    if stage.tool is not None and machine.tool(stage.tool) is None:
        return f"no {stage.tool}"
    for name in stage.not_after_hang:
        if name in hung:
            return f"{name} hung"
    if seconds_left < LEAST_S:
        return "no time left"
    return None


def run(stage: Stage, command: list[str], limit_s: float, env: dict[str, str], log: IO[str]) -> str:
    """Run a stage and everything it starts, for so long at most; its status."""
    log.write(f"\n==== {stage.name}: {' '.join(command)}\n")
    log.flush()
    code = limited.run(
        command,
        limit_s,
        cwd=ROOT,
        env=env | dict(stage.env),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    if code == limited.TIMED_OUT:
        return TIMED_OUT
    return PASSED if code == 0 else FAILED


def tail(log: Path, start: int) -> str:
    """The last lines that a stage wrote."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-TAIL_LINES:])


def check(
    stages: list[Stage], out: Path, python: str, seconds: float, env: dict[str, str]
) -> tuple[dict[str, object], list[Outcome]]:
    """Run stages one after the other; the summary is written after each."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    described = machine.describe(python, env)
    capability = described["capability"]
    if capability is not None:
        env.setdefault("TORCH_CUDA_ARCH_LIST", machine.arch_of(capability))
    outcomes: list[Outcome] = []
    hung: set[str] = set()
    log_path = out / "check.log"
    with log_path.open("w") as log:
        for stage in stages:
            left = deadline - time.monotonic()
            reason = obstacle(stage, capability is not None, left, hung)
            if reason is not None:
                outcomes.append(Outcome(stage.name, SKIPPED, 0.0, reason))
                continue
            print(f"{stage.name}: {stage.what} ...", flush=True)
            log.flush()
            before, begun = log_path.stat().st_size, time.monotonic()
            command = command_of(stage, python, out, hung)
            status = run(stage, command, min(stage.limit_s, left - limited.GRACE_S), env, log)
            log.flush()
            seconds_taken = time.monotonic() - begun
            outcomes.append(Outcome(stage.name, status, seconds_taken, details_of(stage.name, out)))
            if status == TIMED_OUT:
                hung.add(stage.name)
            if status != PASSED:
                print(tail(log_path, before), flush=True)
            if stage.name == "packages":
                # What was missing may be there now.
                described |= machine.versions(python, env)
            write(out / "check.json", described, outcomes)
    write(out / "check.json", described, outcomes)
    return described, outcomes


def plan(stages: list[Stage], out: Path, python: str, env: Mapping[str, str]) -> str:
    """What would be run, for --dry-run."""
    lines = [f"{'stage':10} {'limit s':>7}  command"]
    for stage in stages:
        settings = "".join(f"{name}={value} " for name, value in stage.env)
        command = " ".join(command_of(stage, python, out))
        lines.append(f"{stage.name:10} {stage.limit_s:7}  {settings}{command}")
    return "\n".join(lines)


def chosen(names: Collection[str] | None) -> list[Stage]:
    """Stages by name, in their own order; all of them without names.

    What was packed is of no use before the extension is in place, so packages brings build along.
    """
    wanted = {*names, *(["build"] if "packages" in names else [])} if names else None
    return [stage for stage in STAGES if wanted is None or stage.name in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of results; $OUT or build/gpu-check")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES])
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    options = parser.parse_args()
    out = options.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    out = out.resolve()
    stages = chosen(options.stages)
    env = environment()
    if options.dry_run:
        print(plan(stages, out, sys.executable, env))
        return 0
    # So that what a stage has started ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    described, outcomes = check(stages, out, sys.executable, 60 * options.minutes, env)
    print(table(described, outcomes))
    print(f"results in {out}")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
