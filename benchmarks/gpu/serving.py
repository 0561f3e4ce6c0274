# SPDX-License-Identifier: Apache-2.0
"""Serves a random Llama with vLLM, dense, compressed and compressed by head, and compares.

Usage: python benchmarks/gpu/serving.py --out serving.json [--size tiny --device cpu]

Each configuration runs in a process of its own, with the same pool, prompts and scheduling:

    identity      prompts within the budget: the tokens must be the same
    tight         more long prompts than the dense pool holds: throughput, blocks, preemptions
    decode        as many long prompts as both hold: the time of a decoding step
    decode_short  as many prompts as long as a compressed request: a step at that length

Succeeds when the tokens are the same, long requests were compressed, every block is free at the
end, and compressed requests held fewer. Times are reported, not judged. By head, attention rounds
otherwise, so that only most first tokens have to be the same.

A configuration that fails, or takes longer than --limit, is tried once more without CUDA graphs,
which says whether these are to blame, and is a failure all the same. The report is written after
every try, so that what was found stays found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import limited
from gpu.serving_sizes import CONFIGURATIONS, SIZES, make_model

# Seconds that a configuration may take, start and compilation included.
LIMIT_S = 100
TAIL_LINES = 30


@dataclass(frozen=True)
class Attempt:
    """One try of a configuration.

    Attributes:
        error: None where it succeeded, else what it was stopped for, or said last.
    """

    configuration: str
    cuda_graphs: bool
    seconds: float
    error: str | None


def attempt(
    name: str, options: argparse.Namespace, model: str, eager: bool
) -> tuple[Attempt, dict[str, Any] | None]:
    """Try a configuration in a process of its own; how it went, and what it found."""
    print(f"{name}{', without CUDA graphs' if eager else ''}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).with_name("serving_run.py")), name]
        command += ["--model", model, "--out", str(found), "--size", options.size]
        command += ["--device", options.device, *(["--eager"] if eager else [])]
        code, said = run_and_repeat(command, options.limit)
        seconds = time.monotonic() - begun
        ran = code == 0 and found.is_file()
        result = json.loads(found.read_text()) if ran else None
    reason = f"stopped after {options.limit:g} s" if code == limited.TIMED_OUT else f"exit {code}"
    error = None if ran else f"{reason}\n{said}"
    return Attempt(name, options.device == "cuda" and not eager, seconds, error), result


def run_and_repeat(command: list[str], limit_s: float) -> tuple[int, str]:
    """Run a command and print what it prints; its exit code and its last lines."""
    lines: deque[str] = deque(maxlen=TAIL_LINES)
    with tempfile.NamedTemporaryFile("r", errors="replace") as log, open(log.name, "wb") as sink:
        ended = threading.Event()
        reader = threading.Thread(target=_repeat, args=(log, lines, ended), daemon=True)
        reader.start()
        try:
            code = limited.run(command, limit_s, stdout=sink, stderr=subprocess.STDOUT)
        finally:
            ended.set()
            reader.join()
    return code, "".join(lines)


def _repeat(log: IO[str], lines: deque[str], ended: threading.Event) -> None:
    """Print lines as they come to a file, until it grows no more.

    A file and not a pipe: a process that cannot be killed would keep a pipe open for ever.
    """
    while True:
        last = ended.is_set()
        for line in log:
            lines.append(line)
            print(line, end="", flush=True)
        if last:
            return
        ended.wait(0.2)


def verdict(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the results of all configurations; empty when all is well."""
    dense, ems, heads = (runs[name] for name in CONFIGURATIONS)
    wrong = []
    if dense["answers"] != ems["answers"]:
        wrong.append("within the budget, tokens differ from dense vLLM's")
    if 2 * num_alike_at_first(dense["answers"], heads["answers"]) <= len(dense["answers"]):
        wrong.append("by head, most first tokens differ from dense vLLM's")
    for name, found in (("", ems), ("by head, ", heads)):
        if found["compactions"] == 0:
            wrong.append(f"{name}no request was compressed")
        if found["decode"]["late_blocks"] >= dense["decode"]["late_blocks"]:
            wrong.append(f"{name}compressed requests hold as many blocks as dense ones")
    if any(found["used_at_end"] for found in runs.values()):
        wrong.append("blocks are in use although no request is left")
    return wrong


def num_alike_at_first(answers: list[list[int]], others: list[list[int]]) -> int:
    """Answers that begin with the same token."""
    return sum(one[0] == other[0] for one, other in zip(answers, others, strict=True))


def report(
    options: argparse.Namespace, attempts: list[Attempt], runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is known after some attempts.

    Args:
        runs: Results of the configurations that have some, by name.
    """
    wrong = [
        f"{tried.configuration} fails {'with' if tried.cuda_graphs else 'without'} CUDA graphs: "
        f"{tried.error.splitlines()[0]}"
        for tried in attempts
        if tried.error is not None
    ]
    complete = set(runs) == set(CONFIGURATIONS)
    wrong += verdict(runs) if complete else []
    size = SIZES[options.size]
    return {
        "size": options.size,
        "compression": {name: size.compression(name) for name in CONFIGURATIONS},
        "num_blocks": size.num_blocks,
        "attempts": [asdict(tried) for tried in attempts],
        "complete": complete,
        "tokens_identical": runs["dense"]["answers"] == runs["ems"]["answers"]
        if complete
        else None,
        "wrong": wrong,
        "runs": {
            name: {key: value for key, value in found.items() if key != "answers"}
            for name, found in runs.items()
        },
    }


def try_all(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Try every configuration, again without CUDA graphs where it fails; the report."""
    attempts: list[Attempt] = []
    runs: dict[str, dict[str, Any]] = {}
    with_graphs = options.device == "cuda" and not options.eager
    for eager in (False, True) if with_graphs else (options.eager,):
        for name in CONFIGURATIONS:
            if name in runs:
                continue
            # What remains if this process is stopped meanwhile.
            cut_off = Attempt(name, with_graphs and not eager, 0.0, "cut off")
            write(options.out, report(options, [*attempts, cut_off], runs))
            tried, result = attempt(name, options, model, eager)
            attempts.append(tried)
            if result is not None:
                runs[name] = result | {"cuda_graphs": tried.cuda_graphs}
            found = report(options, attempts, runs)
            write(options.out, found)
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=list(SIZES), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds per configuration")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(SIZES[options.size], Path(folder))
        found = try_all(options, folder)
    print(json.dumps(found["runs"], indent=2))
    for sentence in found["wrong"]:
        print(f"NOT PASSED: {sentence}")
    return 1 if found["wrong"] or not found["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
