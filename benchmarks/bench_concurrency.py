# SPDX-License-Identifier: Apache-2.0
"""How many requests run at a time in one pool, dense and with settings of compression.

Usage: ems-vllm eval MODEL --tasks niah,people --lengths 4096 ... --export-prompts prompts.jsonl
       OMP_NUM_THREADS=1 python benchmarks/bench_concurrency.py --model MODEL \\
           --prompts prompts.jsonl --num-blocks 900 \\
           --setting 'ratio 0.25={"recipe": "ems", "ratio": 0.25}' \\
           --out benchmarks/results/concurrency-cpu.json

All requests are there from the start. Counted are the steps in which some of them wait, so that it
is the pool that decides; requests whose prompt is still coming in count as running. With a coverage
prompts must be real ones: how much of them is kept depends on what they say.
"""

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from offline import engine
from rich.console import Console
from rich.table import Table
from serving.report import write

from ems_vllm.eval.records import environment

DENSE = "dense"
COLUMNS = ("setting", "running", "most", "held", "steps")


def run(
    model: str,
    dtype: str,
    prompts: list[str],
    num_new: int,
    num_blocks: int,
    max_model_len: int,
    setting: dict[str, Any] | None,
) -> dict[str, Any]:
    """Answer all prompts; what ran at a time and what was held at the end."""
    from vllm import SamplingParams

    config = {} if setting is None else {"kv_compression": setting}
    with engine(
        model,
        dtype=dtype,
        longest=max_model_len,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,
        num_gpu_blocks_override=num_blocks,
        additional_config=config,
    ) as llm:
        core = llm.llm_engine
        scheduler = core.engine_core.engine_core.scheduler
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            core.add_request(str(index), prompt, params)
        running, held, num_steps = [], {}, 0
        while core.has_unfinished_requests():
            outputs = core.step()
            num_steps += 1
            if scheduler.waiting:
                running.append(len(scheduler.running))
            for output in outputs:
                # Where nothing is compressed, no sequence says what it holds.
                holding = getattr(output.outputs[0], "kv_compression", None)
                share = 1.0 if holding is None else holding.num_entries / holding.num_tokens
                held[output.request_id] = share
    return {
        "running": round(statistics.mean(running), 2) if running else None,
        "most": max(running, default=len(prompts)),
        "held": round(statistics.mean(held.values()), 3),
        "held_each": sorted(round(share, 3) for share in held.values()),
        "steps": num_steps,
    }


def parsed(settings: list[str]) -> dict[str, dict[str, Any] | None]:
    """Settings by name; dense first."""
    chosen: dict[str, dict[str, Any] | None] = {DENSE: None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"setting={setting!r} has no name: write NAME={{...}}.")
        chosen[name] = json.loads(text)
    return chosen


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    prompts: Annotated[Path, typer.Option(help="Of `ems-vllm eval --export-prompts`.")],
    setting: Annotated[list[str], typer.Option(help="NAME=JSON of kv_compression; repeatable.")],
    num_blocks: Annotated[int, typer.Option(min=2, help="Blocks of the pool, of 16 tokens.")],
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    num_prompts: Annotated[int, typer.Option(min=2)] = 16,
    num_new_tokens: Annotated[int, typer.Option(min=8)] = 128,
    max_model_len: Annotated[int, typer.Option(min=512)] = 4608,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """Count requests that run at a time in a pool of blocks."""
    described = environment.describe()
    lines = prompts.read_text(encoding="utf-8").splitlines()[:num_prompts]
    texts = [json.loads(line)["prompt"] for line in lines]
    chosen = parsed(setting)
    rows = []
    table = Table(title=f"{len(texts)} requests, {num_blocks:,} blocks")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for name, one in chosen.items():
        found = run(model, dtype, texts, num_new_tokens, num_blocks, max_model_len, one)
        rows.append({"setting": name, **found})
        table.add_row(*(str(rows[-1][column]) for column in COLUMNS))
    Console().print(table)
    if out is not None:
        command = shlex.join(["python", *sys.argv]).replace(model, Path(model).name)
        settings = {
            "model": Path(model).name, "dtype": dtype, "num_blocks": num_blocks,
            "num_prompts": len(texts), "num_new_tokens": num_new_tokens,
            "kv_compression": chosen,
        }  # fmt: skip
        report = {"command": command, "environment": described, "settings": settings, "rows": rows}
        write(out, report)


if __name__ == "__main__":
    typer.run(main)
