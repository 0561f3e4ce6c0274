# SPDX-License-Identifier: Apache-2.0
"""Ablations on transformers: each prompt is processed once, for dozens of variants.

Usage: python -m ems_vllm.eval.lab --model FOLDER --prompts prompts.jsonl \\
    --variants scorers --budgets 0.06 0.25 --out result.json

The right answer is forced, so that a variant costs a compaction and one forward pass of a few
tokens. A run that was interrupted goes on where it stopped, from a journal beside the result.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from ems_vllm.config import ConfigError, parse_overrides
from ems_vllm.config.errors import shown
from ems_vllm.eval.lab.sizes import parse_sizes
from ems_vllm.eval.lab.variants import configured, described, names, read_variants
from ems_vllm.eval.records import environment
from ems_vllm.eval.records.prompt_files import read_prompts
from ems_vllm.eval.records.readable_json import readable
from ems_vllm.eval.script import run_script

# Where output is no terminal, as in a log.
_WIDTH = 220


# More than bfloat16 knows.
_DIGITS = 5


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    variants: Annotated[str, typer.Option(help=f"{', '.join(names())}, or a YAML file.")],
    budgets: Annotated[
        list[str],
        typer.Option(
            help="Entries per kv_head in all, fractions of the length, or ratios of bytes (4x); "
            "several."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON file for the result.")],
    further: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="BUDGET")] = None,
    config: Annotated[str, typer.Option(help="Settings of all, JSON or a YAML file.")] = "{}",
    errors: Annotated[bool, typer.Option(help="Measure errors of attention.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16")] = "auto",
    compiled: Annotated[bool, typer.Option(help="Use the compiled operators: faster.")] = True,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
) -> None:
    """Compare variants of recipes by the loss of right answers, on transformers."""
    # `--budgets 0.06 0.25`: an option takes one value, so the others come as arguments.
    sizes = parse_sizes([*budgets, *(further or ())])
    asked = read_prompts(prompts)
    # Before the limit, so that a run with more prompts has the same settings.
    compared = read_variants(variants)
    configs = configured(compared, sizes, asked, parse_overrides(config), block_size)

    # Imported here: mistakes above must not take the seconds that transformers takes.
    from ems_vllm.eval.lab.cells import cells, prompt_digest
    from ems_vllm.eval.lab.forcing import Forced
    from ems_vllm.eval.lab.journal import Journal
    from ems_vllm.eval.lab.result import LabResult, full_summaries, prompt_results, summaries
    from ems_vllm.eval.lab.runner import Lab
    from ems_vllm.eval.lab.table import table
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine
    from ems_vllm.eval.transformers_engine.quantised import cache_format

    asked = asked[:limit]
    forced = [(prompt, found) for prompt in asked if (found := Forced.of(prompt))]
    if not forced:
        raise ConfigError(
            f"prompts={shown(str(prompts))} has no right answers of two tokens or more "
            "(gold_token_ids, continuation_token_ids): export prompts of other tasks."
        )
    engine = TransformersEngine.load(model, device, dtype, block_size)
    for variant in compared:
        cache_format(variant.kv_cache_dtype).check(engine.shape.head_size)
    lab = Lab(engine, compiled, errors)
    common = {**engine.describe(model, compiled), "device": str(engine.model.device)}
    journal = Journal(out.with_suffix(".journal.jsonl"), common)
    chosen = cells(compared, configs, sizes, errors)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for prompt, answer in track(forced, "prompts", console=console):
        record = journal.records.get(prompt_digest(prompt))
        done = record.cells if record else {}
        todo = [
            cell
            for cell in chosen
            if cell.digest not in done
            and cell.options(prompt, block_size, engine.shape) is not None
        ]
        if todo:
            journal.add(lab.measure(prompt, answer, todo))
    measured = prompt_results([prompt for prompt, _ in forced], chosen, journal.records)
    result = LabResult(
        model=model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment={**environment.describe(), **common},
        settings={one.name: described(one, configs[one.name]) for one in compared},
        budgets=list(dict.fromkeys(str(cell.size) for cell in chosen)),
        full=full_summaries(measured),
        summaries=summaries(measured, chosen),
        prompts=measured,
        left_out=len(asked) - len(forced),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        readable(json.loads(result.model_dump_json(exclude_none=True)), _DIGITS), encoding="utf-8"
    )
    console.print(table(result))
    if result.left_out:
        console.print(f"{result.left_out:,} prompts have no right answer to force: left out.")
    console.print(f"{len(measured):,} prompts, {len(configs)} variants: {out}")


if __name__ == "__main__":
    run_script(main)
