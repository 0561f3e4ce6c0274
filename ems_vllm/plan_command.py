# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm plan`: what a budget means, before serving with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ems_vllm.capacity import RequestColumns, pool_columns, pool_fit, request_columns
from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.head_shares import HeadShares, least_and_most
from ems_vllm.plan import PlanSettings, prompt_blocks
from ems_vllm.policies.allocators.ada import AdaAllocator
from ems_vllm.policies.allocators.uniform import UniformAllocator

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan

_SHAPE = Annotated[int | None, typer.Option(min=1, help="Of the model, instead of --model.")]


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command()(plan)


def plan(
    prompt_len: Annotated[list[int], typer.Option(min=1, help="Prompt length; may be repeated.")],
    output_len: Annotated[int, typer.Option(min=0, help="Tokens to generate.")] = 1024,
    recipe: Annotated[str, typer.Option(help="Recipe or YAML file.")] = "ems",
    budget: Annotated[int | None, typer.Option(min=1, help="Entries kept per kv_head.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of the prompt kept.")] = None,
    recent_window: Annotated[
        int | None, typer.Option(min=1, help="Last tokens that stay, beside the budget.")
    ] = None,
    recompress_interval: Annotated[
        int | None, typer.Option(min=0, help="Generated tokens between two compressions.")
    ] = None,
    prefill_interval: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which a prompt is compressed.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 16,
    model: Annotated[
        Path | None, typer.Option(help="Model folder or config.json, for bytes.")
    ] = None,
    num_layers: _SHAPE = None,
    num_kv_heads: _SHAPE = None,
    head_size: _SHAPE = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the cache; the model's, or bfloat16, unless given.")
    ] = None,
    pool_gib: Annotated[
        float | None,
        typer.Option(help="GiB for the KV cache, of all GPUs together: how many requests fit."),
    ] = None,
) -> None:
    """Show the columns that requests hold, dense and compressed, and how many requests fit."""
    config = _config(recipe, budget, ratio, recent_window, recompress_interval, prefill_interval)
    shape = _shape(model, num_layers, num_kv_heads, head_size, dtype)
    settings = _settings(config, shape)
    column_bytes = shape.column_bytes(block_size) if shape else None
    requests = {
        length: request_columns(settings, length, output_len, block_size) for length in prompt_len
    }
    size = f"budget {config.budget}" if config.budget is not None else f"ratio {config.ratio}"
    out = Console()
    title = f"Columns of {block_size} tokens: {recipe}, {size}, {output_len} generated tokens"
    out.print(_columns_table(title, requests, column_bytes))
    if settings.shares is not None:
        heads = config.allocator.head_shares()
        out.print(_levels_table(settings, heads, prompt_len, block_size))
    if config.allocator.deals_by_scores:
        out.print(
            "kv_heads share what their layer keeps, by the scores of each compaction.", style="dim"
        )
    whole = "the prompt itself is processed dense"
    if config.prefill_interval:
        whole = "that of a prompt, while it is processed, is among them"
    out.print(f"'at most' is reached between two compressions; {whole}.", style="dim")
    if pool_gib is not None:
        _print_pool(out, pool_gib, requests, shape, block_size)


def _config(
    recipe: str,
    budget: int | None,
    ratio: float | None,
    recent_window: int | None,
    recompress_interval: int | None,
    prefill_interval: int | None,
) -> KVCompressionConfig:
    """A recipe with what was given on the command line."""
    overrides = {
        "budget": budget,
        "ratio": ratio,
        "recent_window": recent_window,
        "recompress_interval": recompress_interval,
        "prefill_interval": prefill_interval,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    config = load_config({"recipe": recipe, **given})
    if config is None:
        raise ConfigError(f"recipe={recipe!r} compresses nothing: name a recipe.")
    return config


def _shape(
    model: Path | None,
    num_layers: int | None,
    num_kv_heads: int | None,
    head_size: int | None,
    dtype: str | None,
) -> CacheShape | None:
    """From a model's configuration or from numbers; None where nothing was said of a model."""
    counts = (num_layers, num_kv_heads, head_size)
    if model is not None:
        if counts != (None, None, None):
            raise ConfigError(
                f"model={str(model)!r} has its own layers and heads: drop --num-layers, "
                "--num-kv-heads and --head-size, or --model."
            )
        return CacheShape.read(model, dtype)
    if num_layers is None and num_kv_heads is None and head_size is None:
        if dtype is not None:
            raise ConfigError(f"dtype={dtype!r} alone is no cache shape: give --model.")
        return None
    if num_layers is None or num_kv_heads is None or head_size is None:
        raise ConfigError(
            f"num_layers={num_layers}, num_kv_heads={num_kv_heads}, head_size={head_size} is no "
            "cache shape: give all three, or --model."
        )
    return CacheShape.of(num_layers, num_kv_heads, head_size, dtype or "bfloat16")


def _settings(config: KVCompressionConfig, shape: CacheShape | None) -> PlanSettings:
    """Settings of the plan; those of an allocator that deals to layers need the model."""
    if shape is not None:
        return config.plan_settings_of(shape.num_layers)
    if not isinstance(config.allocator, UniformAllocator | AdaAllocator):
        raise ConfigError(
            f"allocator={config.allocator.name()!r} shares a budget among the layers of a model: "
            "give --model."
        )
    return config.plan_settings


def _columns_table(
    title: str, requests: Mapping[int, RequestColumns], column_bytes: int | None
) -> Table:
    """Columns of a request, by the length of its prompt."""
    table = Table(title=title)
    for name in ("prompt", "dense", "after prompt", "at the end", "at most", "saved"):
        table.add_column(name, justify="right")
    if column_bytes:
        for name in ("dense MiB", "at most MiB"):
            table.add_column(name, justify="right")
    for length, columns in requests.items():
        row = [f"{length:,}", f"{columns.dense:,}"]
        row += map(_count, (columns.after_prompt, columns.at_end, columns.at_most))
        row.append(f"{1 - columns.at_most / columns.dense:.0%}")
        if column_bytes:
            held = (columns.dense, columns.at_most)
            row += [f"{count * column_bytes / 2**20:,.1f}" for count in held]
        table.add_row(*row)
    return table


def _count(mean: float) -> str:
    return f"{mean:,.1f}".removesuffix(".0")


def _print_pool(
    out: Console,
    pool_gib: float,
    requests: Mapping[int, RequestColumns],
    shape: CacheShape | None,
    block_size: int,
) -> None:
    """How many requests a pool holds, and what that takes for granted."""
    if not pool_gib > 0:
        raise ConfigError(f"pool_gib={pool_gib} is not allowed: give a number of GiB above 0.")
    if shape is None:
        raise ConfigError(
            f"pool_gib={pool_gib:g} holds columns of a model: give --model, or --num-layers, "
            "--num-kv-heads and --head-size."
        )
    if shape.other_layers:
        raise ConfigError(
            f"pool_gib={pool_gib:g} is shared with layers of another kind in this model "
            f"({', '.join(shape.other_layers)}): read how many requests fit in the server's "
            "start-up log."
        )
    num_columns = pool_columns(int(pool_gib * 2**30), shape.column_bytes(block_size))
    table = Table(title=f"Requests that fit a pool of {pool_gib:g} GiB: {num_columns:,} columns")
    for name in ("prompt", "dense", "compressed", "with one coming in"):
        table.add_column(name, justify="right")
    for length, columns in requests.items():
        fit = pool_fit(columns, num_columns)
        counts = (fit.dense, fit.decoding, fit.with_one_coming_in)
        table.add_row(f"{length:,}", *(f"{count:,}" for count in counts))
    out.print(table)
    out.print(
        "By arithmetic, nothing was measured. 'dense' has room for the last token of each; "
        "'compressed' counts 'at most' for each, prompts being over; 'with one coming in' counts "
        "one whose prompt is still being processed, and is 0 where that prompt alone does not fit. "
        "All layers are compressed. The pool is what is left for the cache: not counted "
        "are scores and recorded queries (1 to 2 % of a large pool, named in the start-up log), "
        "vLLM's --max-num-seqs, and what the GPU can compute in time.",
        style="dim",
    )


def _levels_table(
    settings: PlanSettings,
    heads: Mapping[int, HeadShares] | None,
    prompt_len: Sequence[int],
    block_size: int,
) -> Table:
    """What each level keeps of each prompt; with shares of heads, the least and most of a head."""
    assert settings.shares is not None
    table = Table(title="Entries kept per kv_head, beside the recent window", show_lines=False)
    table.add_column("layers")
    for length in prompt_len:
        table.add_column(f"of {length:,}", justify="right")
    for layers, (_, of_level) in zip(settings.shares.levels, settings.levels(), strict=True):
        plans = [of_level.plan(length, block_size, RequestOptions()) for length in prompt_len]
        kept = [f"{min(plan.budget_blocks * block_size, plan.prompt_len):,}" for plan in plans]
        if heads is not None:
            of_level_heads = [heads[layer] for layer in layers]
            spans = (_span_of_heads(of_level_heads, plan, block_size) for plan in plans)
            kept = [f"{mean} ({span})" for mean, span in zip(kept, spans, strict=True)]
        table.add_row(", ".join(map(str, layers)), *kept)
    return table


def _span_of_heads(heads: Sequence[HeadShares], plan: CompressionPlan, block_size: int) -> str:
    """Fewest and most entries that a kv_head keeps of a prompt."""
    before_window = prompt_blocks(plan.prompt_len, plan.recent_window, block_size)
    pages = least_and_most(heads, plan.budget_blocks, before_window)
    least, most = (min(count * block_size, plan.prompt_len) for count in pages)
    return f"{least:,} to {most:,}"
