# SPDX-License-Identifier: Apache-2.0
"""The outcome of a GPU check: one table, one file, one exit code."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        status: PASSED, FAILED, TIMED_OUT or SKIPPED.
        details: One line: why, or what was found.
    """

    stage: str
    status: str
    seconds: float
    details: str = ""


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 only when everything that was asked for was done and passed."""
    return 0 if outcomes and all(o.status == PASSED for o in outcomes) else 1


def table(machine: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """What a person reads."""
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("driver", "nvcc", "python", "torch", "triton", "vllm", "transformers")
        if machine.get(name)
    )
    lines = [
        f"{machine.get('gpu') or 'no GPU'}; {versions}; commit {machine.get('commit')}",
        f"{'stage':10} {'outcome':9} {'seconds':>7}  details",
    ]
    lines += [f"{o.stage:10} {o.status:9} {o.seconds:7.1f}  {o.details}" for o in outcomes]
    lines.append("PASSED" if exit_code(outcomes) == 0 else "NOT PASSED")
    return "\n".join(lines)


def write(path: Path, machine: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """The same for programs."""
    passed = exit_code(outcomes) == 0
    report = {"machine": machine, "passed": passed, "stages": [asdict(o) for o in outcomes]}
    path.write_text(json.dumps(report, indent=2) + "\n")


def details_of(stage: str, folder: Path) -> str:
    """What a stage's own files say, in a line; empty when there are none."""
    reader = _READERS.get(stage)
    try:
        return reader(folder) if reader else ""
    except (OSError, ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        return f"its results cannot be read: {error!r}"


def _tests(name: str) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        suites = list(ElementTree.parse(folder / name).getroot().iter("testsuite"))
        count = {
            key: sum(int(suite.get(key, 0)) for suite in suites)
            for key in ("tests", "failures", "errors", "skipped")
        }
        wrong = count["failures"] + count["errors"]
        return f"{count['tests']} tests, {wrong} failed, {count['skipped']} skipped"

    return read


def _bench(folder: Path) -> str:
    lines = json.loads((folder / "ops.json").read_text())["lines"]
    ours = [
        line
        for line in lines
        if line["provider"] == "ems_vllm" and line["length"] == 32768 and line["num_rows"] == 1
    ]
    judged = [line for line in ours if line["of_target"] is not None]
    met = sum(line["of_target"] >= 1 for line in judged)
    return f"{len(lines)} timings; at 32k, {met} of {len(judged)} targets met"


def _variants(folder: Path) -> str:
    """Milliseconds of each build with all queries and their log-sum-exps, the first timing."""
    builds = json.loads((folder / "variants.json").read_text())["builds"]
    return ", ".join(
        f"{name} {lines[0]['p50_ms']:.2f} ms" if lines else f"{name} failed"
        for name, lines in builds.items()
    )


def _serving(folder: Path) -> str:
    found = json.loads((folder / "serving.json").read_text())
    if not found["complete"]:
        return "; ".join(_attempt(tried) for tried in found["attempts"])
    tokens = "identical" if found["tokens_identical"] else "DIFFERENT"
    runs = [found["runs"][name]["tight"] for name in ("dense", "ems", "heads")]
    blocks = ", ".join(str(run["peak_blocks"]) for run in runs)
    speeds = ", ".join(f"{run['tokens_per_s']:.0f}" for run in runs)
    return f"tokens {tokens}; peak blocks {blocks}; tokens/s {speeds} (dense, EMS, EMS by head)"


def _attempt(tried: dict[str, Any]) -> str:
    """One try of a configuration, with the first and the last line of its error."""
    graphs = "" if tried["cuda_graphs"] else " (no CUDA graphs)"
    lines = (tried["error"] or "ran").splitlines()
    return f"{tried['configuration']}{graphs}: {', '.join(dict.fromkeys([lines[0], lines[-1]]))}"


_READERS: dict[str, Callable[[Path], str]] = {
    "tests": _tests("tests.xml"),
    "graphs": _tests("graphs.xml"),
    "bench": _bench,
    "variants": _variants,
    "serving": _serving,
}
