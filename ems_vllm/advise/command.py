# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm advise`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ems_vllm.advise.advice import advise_on
from ems_vllm.advise.asked import Asked
from ems_vllm.advise.table import print_report
from ems_vllm.advise.thresholds import MAX_KL
from ems_vllm.config import ConfigError, parse_overrides


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command()(advise)


def advise(
    model: Annotated[str, typer.Argument(help="Model folder, or its name on the Hub.")],
    prompts: Annotated[
        Path,
        typer.Option(help="Your requests, JSON lines: prompts, or their lengths (docs/advise.md)."),
    ],
    recipe: Annotated[str, typer.Option(help="Recipe or YAML file.")] = "ems",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Entries kept (1024) or a fraction of the prompt (0.25); may be repeated."
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="Further settings, JSON or a YAML file.")] = "{}",
    pool_gib: Annotated[
        float | None, typer.Option(help="GiB for the KV cache, of all GPUs together.")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="Instead, as of `vllm serve`: bytes on each GPU.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As of `vllm serve`.")] = 1,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="As of `vllm serve`: requests at a time.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 16,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Of the pool: fp8, bfloat16, ...; the model's unless given.")
    ] = None,
    output_len: Annotated[
        int, typer.Option(min=0, help="Tokens of an answer of which a line says nothing.")
    ] = 1024,
    token_ms: Annotated[
        float, typer.Option(help="Assumed in a replay of arrivals: ms from token to token.")
    ] = 25,
    prompt_rate: Annotated[
        float, typer.Option(help="Assumed likewise: prompt tokens processed in a second.")
    ] = 10_000,
    no_quality: Annotated[
        bool, typer.Option("--no-quality", help="Run no prompt, even where texts are given.")
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="Prompts to run.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer that are compared.")] = 64,
    max_prompt_len: Annotated[
        int, typer.Option(min=1, help="Longer prompts are not run, in tokens.")
    ] = 4096,
    max_kl: Annotated[
        float, typer.Option(help="Mean KL from the dense cache that is close enough, nats a token.")
    ] = MAX_KL,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for a figure, a page and the JSON.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Suggest a budget for your own requests: what it frees, and what it changes on a sample.

    Lengths are replayed by the plan that a server follows, without a model; a sample of the prompts
    is run on transformers, which takes minutes and says so before it starts.
    """
    if not (token_ms > 0 and prompt_rate > 0 and max_kl > 0):
        raise ConfigError(
            f"token_ms={token_ms:g}, prompt_rate={prompt_rate:g} and max_kl={max_kl:g} must be "
            "above 0."
        )
    write = None
    if out is not None:
        # What cannot be written is refused before minutes are spent.
        from ems_vllm.advise.page import writer

        write = partial(writer(), out=out)
    asked = Asked(
        model=model,
        prompts=prompts,
        recipe=recipe,
        budgets=budget or [],
        settings=parse_overrides(config),
        pool_gib=pool_gib,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=max_num_seqs,
        block_size=block_size,
        kv_cache_dtype=kv_cache_dtype,
        output_len=output_len,
        token_ms=token_ms,
        prompt_rate=prompt_rate,
        quality=not no_quality,
        sample=sample,
        tokens=tokens,
        max_prompt_len=max_prompt_len,
        max_kl=max_kl,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    # Progress goes aside: what is printed may be piped into a program.
    report = advise_on(asked, Console(stderr=True))
    if json:
        Console().print_json(report.model_dump_json())
    else:
        print_report(Console(), report)
    if write is not None:
        write(report)
        Console(stderr=True).print(f"Page: {out}/advice.md", highlight=False, markup=False)
