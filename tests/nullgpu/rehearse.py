# SPDX-License-Identifier: Apache-2.0
"""The GPU check on the null GPU, with what `make gpu-pack` packed: `make gpu-rehearsal`.

It runs in a copy of the checkout, as on a lent machine, with the packages of that machine alone
(machine.txt). The packed extension has CUDA's runtime in it, so the null GPU's takes its place: the
one that computes for the stages that compare numbers, the one that only launches for the others.
Two stages have to fail here, each for what it should: smoke asks other kernels than ours for
numbers, and tokens are whatever the memory held. The exit code is 0 when all is as expected.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from paths import BUILD, COMPUTING_SITE, HERE, ROOT, SITE, environment

COPY = BUILD / "rehearsal"
OUT = BUILD / "gpu-check"
COMPUTING_STAGES = ("packages", "build", "smoke", "wgmma", "tests", "graphs", "kernels")
LAUNCHING_STAGES = ("build", "bench", "serving")


def copy_checkout() -> None:
    """What a transfer takes: the checkout's files, and .gpu/."""
    shutil.rmtree(COPY, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name, follow_symlinks=False)
    shutil.copytree(ROOT / ".gpu", COPY / ".gpu")


def replace_operators(site: Path) -> None:
    """Repack the extension with a null GPU's operators."""
    folder = BUILD / "extension"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(ROOT / ".gpu" / "extension.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    shutil.copy(site / "ems_vllm" / "_ops.abi3.so", folder)
    with tarfile.open(COPY / ".gpu" / "extension.tar.xz", "w:xz", preset=0) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def check(name: str, stages: tuple[str, ...], site: Path) -> list[dict[str, object]]:
    """Outcomes of some stages; at most half an hour, for kernels are slow here."""
    replace_operators(site)
    env = environment() | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "mirror"), str(ROOT / "tests")]),
        "VLLM_CACHE_ROOT": str(BUILD / "cache" / "rehearsal"),
    }
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(OUT / name)]
    subprocess.run([*command, "--minutes", "30", "--stages", *stages], cwd=COPY, env=env)
    return json.loads((OUT / name / "check.json").read_text())["stages"]


def main() -> int:
    if not (ROOT / ".gpu" / "extension.tar.xz").is_file():
        print("There is nothing to rehearse: `make gpu-pack` first, where nvcc is.")
        return 1
    copy_checkout()
    outcomes = check("computing", COMPUTING_STAGES, COMPUTING_SITE)
    outcomes += check("launching", LAUNCHING_STAGES, SITE)
    wrong = [
        f"{found['stage']} {found['status']}"
        for found in outcomes
        if found["status"] != "passed" and not fails_as_expected(str(found["stage"]))
    ]
    print(f"NOT AS EXPECTED: {', '.join(wrong)}" if wrong else "As expected.")
    return 1 if wrong else 0


def fails_as_expected(stage: str) -> bool:
    """Whether a stage found wrong what is wrong on the null GPU, and nothing else."""
    if stage == "smoke":
        log = (OUT / "computing" / "check.log").read_text()
        works = set(re.findall(r"^(\w+): works", log, re.M))
        return works == {"operators"} and "HANGS" not in log
    if stage == "serving":
        report = json.loads((OUT / "launching" / "serving.json").read_text())
        return (
            report["complete"]
            and report["wrong"] == ["within the budget, tokens differ from dense vLLM's"]
            and all(run["cuda_graphs"] for run in report["runs"].values())
            and {run["backend"] for run in report["runs"].values()} == {"FLASH_ATTN"}
        )
    return False


if __name__ == "__main__":
    sys.exit(main())
