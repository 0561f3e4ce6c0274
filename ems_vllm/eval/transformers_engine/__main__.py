# SPDX-License-Identifier: Apache-2.0
"""Answer exported prompts with our recipes on transformers, without vLLM.

Usage: python -m ems_vllm.eval.transformers_engine --model FOLDER --prompts prompts.jsonl \\
    --out answers --recipe ems --recipe snapkv --budget 0.06 --budget 0.25

Writes one file of answers per recipe and budget, and all of them as one result, transformers.json,
for `ems-vllm report`. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from ems_vllm.config import parse_overrides
from ems_vllm.eval.records.answer_folder import (
    AnswerFile,
    check_manifest,
    fingerprint,
    missing,
    write_result,
)
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import FULL, TRANSFORMERS, methods_of
from ems_vllm.eval.records.prompt_files import read_prompts
from ems_vllm.eval.script import run_script


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the answers.")],
    recipe: Annotated[list[str], typer.Option(help=f"Recipe or YAML file, or {FULL}.")],
    budget: Annotated[
        list[str], typer.Option(help="Entries per kv_head in all, or a fraction of the length.")
    ],
    config: Annotated[str, typer.Option(help="Further settings, JSON or a YAML file.")] = "{}",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Use the compiled operators: faster.")
    ] = False,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
) -> None:
    """Answer exported prompts with our recipes on transformers, without vLLM."""
    asked = read_prompts(prompts)[:limit]
    overrides = parse_overrides(config)
    chosen = methods_of(recipe, [Budget.parse(text) for text in budget], TRANSFORMERS)

    # Imported here: mistakes above must not take the seconds that transformers takes.
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine
    from ems_vllm.eval.transformers_engine.runner import Runner

    engine = TransformersEngine.load(model, device, dtype, block_size)
    runner = Runner(engine, model, chosen, asked, overrides, compiled)
    environment = {**engine.describe(model, compiled), "settings": overrides}
    check_manifest(out, {**environment, "prompts_sha256": fingerprint(prompts)})
    paths = {method: out / method.file_name for method in chosen}
    console = Console()
    with ExitStack() as stack:
        files = {method: stack.enter_context(AnswerFile(path)) for method, path in paths.items()}
        for item in track(missing(asked, files), "prompts", console=console):
            for method, line in runner.answers(item.prompt, item.methods):
                files[method].write(line)
    result = out / "transformers.json"
    described = {path: runner.describe(method) for method, path in paths.items()}
    environment["device"] = str(engine.model.device)
    write_result(result, asked, described, model, environment)
    console.print(f"{len(asked):,} prompts, {len(chosen)} methods: {result}")


if __name__ == "__main__":
    run_script(main)
