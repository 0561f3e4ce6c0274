# SPDX-License-Identifier: Apache-2.0
"""What compression costs while the pool has room: dense, `when: pressure`, and always.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_pressure.py --model models/smollm2 \\
           --out benchmarks/results/pressure-cpu.json

The same requests all at a time, in a pool for all of them, without hits. Every engine runs in a
process of its own and they take turns with the same prompts, so whatever else the machine does,
hits all of them; CPU seconds count only what an engine computes.
"""

import multiprocessing
import os
import shlex
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from offline import engine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving.load import random_prompts
from serving.report import write

from ems_vllm.eval.records import environment

DENSE = "dense"
# Ids below it are tokens of any model.
_VOCABULARY = 30_000
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    DENSE: None,
    "pressure": {"recipe": "ems", "when": "pressure"},
    "always": {"recipe": "ems", "when": "always"},
}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        num_prompts: Requests at a time.
        budget: Entries kept per kv_head.
    """

    model: str
    dtype: str
    num_prompts: int
    prompt_len: int
    num_new_tokens: int
    budget: int
    repeats: int
    seed: int


def serve(settings: Settings, name: str, pipe: Connection) -> None:
    """Of one process: answers every list of prompts with (seconds, CPU seconds, compactions)."""
    from vllm import SamplingParams

    compression = CONFIGURATIONS[name]
    additional = {}
    if compression is not None:
        additional = {"kv_compression": {**compression, "budget": settings.budget}}
    longest = settings.prompt_len + settings.num_new_tokens
    params = SamplingParams(max_tokens=settings.num_new_tokens, temperature=0, ignore_eos=True)
    with engine(
        settings.model,
        dtype=settings.dtype,
        longest=longest,
        max_num_seqs=settings.num_prompts,
        # Twice what they need: room for all.
        num_gpu_blocks_override=2 * settings.num_prompts * -(-longest // 16),
        enable_prefix_caching=False,
        additional_config=additional,
    ) as llm:
        while (prompts := pipe.recv()) is not None:
            start, cpu = time.perf_counter(), time.process_time()
            requests = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(requests, params, use_tqdm=False)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            held = [getattr(output.outputs[0], "kv_compression", None) for output in outputs]
            pipe.send((seconds, cpu, sum(one.num_compactions for one in held if one is not None)))


def measure(settings: Settings) -> dict[str, list[tuple[float, float, int]]]:
    """By configuration, one measurement a round; the first round is not kept."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    with ExitStack() as stack:
        for name in CONFIGURATIONS:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(settings, name, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            pipes[name] = ours
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in pipes}
        for round_ in track(range(settings.repeats + 1), "rounds"):
            prompts = random_prompts(
                settings.num_prompts, settings.prompt_len, _VOCABULARY, settings.seed + round_
            )
            # Each is first in turn.
            names = list(pipes)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                pipes[name].send(prompts)
                measured = pipes[name].recv()
                if round_ > 0:
                    found[name].append(measured)
    return found


def summary(found: dict[str, list[tuple[float, float, int]]]) -> list[dict[str, Any]]:
    rows = []
    for name, rounds in found.items():
        pairs = list(zip(rounds, found[DENSE], strict=True))
        rows.append(
            {
                "configuration": name,
                "seconds": round(statistics.median(seconds for seconds, _, _ in rounds), 3),
                "cpu_seconds": round(statistics.median(cpu for _, cpu, _ in rounds), 3),
                "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 4),
                "cpu_ratio": round(statistics.median(a[1] / b[1] for a, b in pairs), 4),
                "every_cpu_ratio": [round(a[1] / b[1], 4) for a, b in pairs],
                "compactions": sum(count for _, _, count in rounds),
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2",
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 1500,
    num_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    budget: Annotated[int, typer.Option(min=1, help="Entries kept per kv_head.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after a first one.")] = 9,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Measure, print, and write."""
    settings = Settings(
        model, dtype, num_prompts, prompt_len, num_new_tokens, budget, repeats, seed
    )
    rows = summary(measure(settings))
    table = Table(title="Pool with room for all; ratios to dense are medians of pairs")
    for column in ("configuration", "seconds", "cpu_seconds", "ratio", "cpu_ratio", "compactions"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for row in rows:
        table.add_row(*(str(row[column.header]) for column in table.columns))
    Console().print(table)
    if out is not None:
        result = {
            "command": shlex.join(["python", "benchmarks/bench_pressure.py", *sys.argv[1:]]),
            "environment": {**environment.describe(), "vllm": version("vllm")},
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "settings": asdict(settings),
            "configurations": rows,
        }
        write(out, result)


if __name__ == "__main__":
    typer.run(main)
