# SPDX-License-Identifier: Apache-2.0
"""What gpu_check.py does, in order: commands, their time limits, what they need and write."""

from __future__ import annotations

from dataclasses import dataclass

RUN_TESTS = ("{python}", "benchmarks/gpu/run_tests.py")
SCORE_TESTS = "tests/ops/test_score_queries.py"
# Of a vLLM as `make gpu-pack` packs it, on a machine without a network.
VLLM = (
    # FlashInfer is not there, and vLLM imports it for its sampler where it is not told otherwise.
    ("VLLM_USE_FLASHINFER_SAMPLER", "0"),
    ("VLLM_HOST_IP", "127.0.0.1"),
    ("VLLM_LOGGING_LEVEL", "WARNING"),
)


@dataclass(frozen=True)
class Stage:
    """One command, run in the repository.

    Attributes:
        command: In braces: python, out (folder of results).
        limit_s: It is stopped after so long, with everything it started.
        tool: A program that must be on the machine.
        after_hang: Names of other stages, and arguments that the command gets where one of them ran
            into its limit: what hung there is not waited for again.
        not_after_hang: Names of other stages; where one ran into its limit, this one is left out.
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
    after_hang: tuple[tuple[str, tuple[str, ...]], ...] = ()
    not_after_hang: tuple[str, ...] = ()


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


# The surest first, and of those what is worth most: a machine may be there for minutes.
STAGES = (
    Stage(
        "packages",
        "packages and vLLM of `make gpu-pack`, where the machine has none",
        ("{python}", "benchmarks/gpu/packages.py"),
        limit_s=90,
        needs_gpu=False,
    ),
    Stage(
        "build",
        "the extension for this GPU, in place",
        ("{python}", "benchmarks/gpu/take_extension.py"),
        limit_s=240,
    ),
    Stage(
        "smoke",
        "one call of everything compiled",
        ("{python}", "benchmarks/gpu/smoke.py"),
        limit_s=60,
    ),
    Stage(
        "wgmma",
        "the operator with Hopper's own instructions, where a mistake may hang",
        (*RUN_TESTS, SCORE_TESTS, "-k", "cuda and test_heads", "--limit", "45"),
        limit_s=70,
    ),
    Stage(
        "tests",
        "every operator against its reference",
        (*RUN_TESTS, "tests/ops", "--junitxml", "{out}/tests.xml"),
        limit_s=150,
        writes=("tests.xml",),
        after_hang=(("wgmma", ("--ignore", SCORE_TESTS)),),
    ),
    Stage(
        "graphs",
        "capture and replay in CUDA graphs",
        (*RUN_TESTS, "tests/gpu", "--junitxml", "{out}/graphs.xml", "--limit", "50"),
        limit_s=75,
        writes=("graphs.xml",),
    ),
    Stage(
        "bench",
        "every operator timed beside PyTorch and attention",
        (
            *("{python}", "benchmarks/bench_ops.py", "--device", "cuda", "--seconds", "0.2"),
            # The length that targets are about comes first.
            *("--lengths", "32768", "4096", "131072", "8192"),
            *("--json", "{out}/ops.json", "--csv", "{out}/ops.csv"),
        ),
        limit_s=110,
        writes=("ops.json", "ops.csv"),
        # It begins with one call of each.
        not_after_hang=("wgmma",),
    ),
    Stage(
        "variants",
        "score_queries in the builds that it may be changed to",
        ("{python}", "benchmarks/gpu/time_variants.py", "--out", "{out}/variants.json"),
        limit_s=80,
        writes=("variants.json",),
        not_after_hang=("wgmma",),
    ),
    Stage(
        "serving",
        "vLLM, dense, compressed and by head: same tokens, blocks freed, throughput",
        ("{python}", "benchmarks/gpu/serving.py", "--out", "{out}/serving.json"),
        limit_s=330,
        env=VLLM,
        writes=("serving.json",),
    ),
    _sanitizer("memcheck", 90),
    _sanitizer("racecheck", 90),
    Stage(
        "kernels",
        "no kernel spills or uses local memory",
        ("{python}", "csrc/tools/kernel_report.py"),
        limit_s=30,
        needs_gpu=False,
    ),
)
