# SPDX-License-Identifier: Apache-2.0
"""What gpu_check.py does, in order: commands, their time limits, what they need and write."""

from __future__ import annotations

from dataclasses import dataclass

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")


@dataclass(frozen=True)
class Stage:
    """One command, run in the repository.

    Attributes:
        command: In braces: python, out (folder of results).
        limit_s: It is stopped after so long, with everything it started.
        tool: A program that must be on the machine.
        writes: Names of files in the folder of results.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit_s: int
    needs_gpu: bool = True
    tool: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    writes: tuple[str, ...] = ()


def _sanitizer(tool: str, limit_s: int) -> Stage:
    options = ("--error-exitcode", "99", "--print-limit", "20")
    return Stage(
        name=tool,
        what=f"compute-sanitizer's {tool} over every operator on small shapes",
        command=(
            *("compute-sanitizer", "--tool", tool, *options),
            *("{python}", "benchmarks/gpu/exercise.py", "--only", tool),
        ),
        limit_s=limit_s,
        tool="compute-sanitizer",
        # Else torch hands out parts of large allocations, and overruns stay inside them.
        env=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


STAGES = (
    Stage(
        "packages",
        "wheels and vLLM of `make gpu-pack`, where the machine has none",
        ("{python}", "benchmarks/gpu/packages.py"),
        limit_s=120,
        needs_gpu=False,
    ),
    Stage(
        "build",
        "the extension for this GPU, in place",
        ("{python}", "setup.py", "-q", "build_ext", "--inplace", "egg_info"),
        limit_s=240,
        needs_gpu=False,
        tool="nvcc",
        env=(("EMS_CUDA", "1"),),
    ),
    Stage(
        "kernels",
        "no kernel spills or uses local memory",
        ("{python}", "csrc/tools/kernel_report.py"),
        limit_s=30,
        needs_gpu=False,
    ),
    Stage(
        "tests",
        "every operator against its reference",
        ("{python}", *PYTEST, "tests/ops", "--junitxml", "{out}/tests.xml"),
        limit_s=180,
        writes=("tests.xml",),
    ),
    Stage(
        "graphs",
        "capture and replay in CUDA graphs",
        ("{python}", *PYTEST, "tests/gpu", "--junitxml", "{out}/graphs.xml"),
        limit_s=60,
        writes=("graphs.xml",),
    ),
    Stage(
        "serving",
        "vLLM, dense and compressed: same tokens, blocks freed, throughput",
        ("{python}", "benchmarks/gpu/serving.py", "--out", "{out}/serving.json"),
        limit_s=240,
        writes=("serving.json",),
    ),
    Stage(
        "bench",
        "every operator timed beside PyTorch and attention",
        (
            *("{python}", "benchmarks/bench_ops.py", "--device", "cuda", "--seconds", "0.2"),
            *("--json", "{out}/ops.json", "--csv", "{out}/ops.csv"),
        ),
        limit_s=180,
        writes=("ops.json", "ops.csv"),
    ),
    _sanitizer("memcheck", 90),
    _sanitizer("racecheck", 90),
)
