# SPDX-License-Identifier: Apache-2.0
"""What a decoding step costs where layers or kv_heads share a budget, beside equal budgets.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_levels.py --model MODEL \\
           --out benchmarks/results/levels-cpu.json
       OMP_NUM_THREADS=1 python benchmarks/bench_levels.py --model models/smollm2 --levels 0 \\
           --heads smollm2 --out benchmarks/results/heads-cpu.json

Every level has a block table of its own, and attention's metadata are built for each at every step;
kv_heads that keep unequal numbers have a block table each, which is written in every layer. All
engines hold as many entries. They take turns, so whatever else the machine does hits all of
them; CPU seconds count only what an engine computes.
"""

import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from offline import BLOCK_SIZE, engine
from rich.console import Console
from rich.table import Table
from serving.load import random_prompts
from serving.report import write

from ems_vllm.eval.records import environment

UNIFORM = "uniform"


def allocators(levels: list[int], profile: str | None) -> dict[str, dict[str, Any]]:
    """What is measured, by name.

    Args:
        levels: Numbers of levels; 0 for equal budgets.
        profile: Whose layers, all in one level, deal to their kv_heads; None for none.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for number in levels:
        if number == 0:
            chosen[UNIFORM] = {"name": UNIFORM}
        else:
            chosen[f"{number} levels"] = {"name": "pyramid", "num_levels": number}
    if profile is not None:
        by_head = {"name": "profile", "profile": profile, "num_levels": 1, "per_head": True}
        chosen["by head"] = by_head
    return chosen


def step_seconds(
    model: str,
    dtype: str,
    prompts: list[list[int]],
    num_new: int,
    budget: int,
    allocator: dict[str, Any],
) -> tuple[float, float]:
    """Seconds and CPU seconds of a step in which all requests decode, after their compaction."""
    from vllm import SamplingParams

    longest = len(prompts[0]) + num_new + BLOCK_SIZE
    config = {"recipe": "ems", "budget": budget, "allocator": allocator}
    with engine(
        model,
        dtype=dtype,
        longest=longest,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,
        additional_config={"kv_compression": config},
    ) as llm:
        core = llm.llm_engine
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            core.add_request(str(index), {"prompt_token_ids": prompt}, params)
        done = dict.fromkeys(map(str, range(len(prompts))), 0)
        # Until every prompt has been compressed.
        while min(done.values()) < 2:
            done.update((o.request_id, len(o.outputs[0].token_ids)) for o in core.step())
        num_steps = num_new - max(done.values()) - 1
        start = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            core.step()
        end = time.perf_counter(), time.process_time()
        core.abort_request(list(done))
    return tuple((b - a) / num_steps for a, b in zip(start, end, strict=True))


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    num_prompts: Annotated[int, typer.Option(min=1)] = 4,
    prompt_len: Annotated[int, typer.Option(min=512)] = 2000,
    num_new_tokens: Annotated[int, typer.Option(min=8)] = 64,
    budget: Annotated[int, typer.Option(min=16, help="Entries kept per kv_head.")] = 256,
    levels: Annotated[str, typer.Option(help="Numbers of levels; 0: equal budgets.")] = "0,2,3,6",
    heads: Annotated[
        str | None, typer.Option(help="Profile by which kv_heads share; none: not measured.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """Measure a decoding step with equal and unequal budgets."""
    from transformers import AutoConfig

    described = environment.describe()
    size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    prompts = random_prompts(num_prompts, prompt_len, size, seed)
    chosen = allocators([int(part) for part in levels.split(",")], heads)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, allocator in chosen.items():
            found = step_seconds(model, dtype, prompts, num_new_tokens, budget, allocator)
            times[name].append(found)
    rows = []
    first = next(iter(times.values()))
    for name, of_allocator in times.items():
        wall, cpu = (statistics.median(of_kind) for of_kind in zip(*of_allocator, strict=True))
        ratios = [mine[1] / base[1] for mine, base in zip(of_allocator, first, strict=True)]
        rows.append(
            {
                "allocator": name,
                "step_s": round(wall, 4),
                "step_cpu_s": round(cpu, 4),
                "cpu_ratio": round(statistics.median(ratios), 3),
                "every_cpu_s": [round(one[1], 4) for one in of_allocator],
            }
        )
    table = Table(title=f"{num_prompts} requests of {prompt_len:,} tokens, budget {budget}")
    for name in ("allocator", "step_s", "step_cpu_s", "cpu_ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("allocator", "step_s", "step_cpu_s", "cpu_ratio"))
        )
    Console().print(table)
    if out is not None:
        command = shlex.join(["python", *sys.argv]).replace(model, Path(model).name)
        settings = {
            "model": Path(model).name, "dtype": dtype, "num_prompts": num_prompts,
            "prompt_len": prompt_len, "num_new_tokens": num_new_tokens, "budget": budget,
        }  # fmt: skip
        report = {"command": command, "environment": described, "settings": settings, "rows": rows}
        write(out, report)


if __name__ == "__main__":
    typer.run(main)
