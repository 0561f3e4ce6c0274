# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm`: look before you serve, and measure what you get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ems_vllm.config import ConfigError, RequestOptions, load_config, recipes
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.eval import command as eval_command
from ems_vllm.head_shares import HeadShares, least_and_most
from ems_vllm.plan import PlanSettings, prompt_blocks
from ems_vllm.policies.allocators.ada import AdaAllocator
from ems_vllm.policies.allocators.uniform import UniformAllocator

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan

app = typer.Typer(
    name="ems-vllm",
    help="KV-cache compression for vLLM: plan capacities, inspect recipes, evaluate.",
    no_args_is_help=True,
    add_completion=False,
)
eval_command.register(app)

_COUNT = Annotated[int, typer.Option(min=1)]


@app.command()
def plan(
    prompt_len: Annotated[list[int], typer.Option(min=1, help="Prompt length; may be repeated.")],
    output_len: Annotated[int, typer.Option(min=0, help="Tokens to generate.")] = 1024,
    recipe: Annotated[str, typer.Option(help="Recipe or YAML file.")] = "ems",
    budget: Annotated[int | None, typer.Option(min=1, help="Entries kept per kv_head.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of the prompt kept.")] = None,
    recent_window: Annotated[int | None, typer.Option(min=1)] = None,
    recompress_interval: Annotated[int | None, typer.Option(min=0)] = None,
    prefill_interval: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which a prompt is compressed.")
    ] = None,
    block_size: _COUNT = 16,
    model: Annotated[
        Path | None, typer.Option(help="Model folder or config.json, for bytes.")
    ] = None,
) -> None:
    """Show the columns that requests hold, dense and compressed, and what is saved."""
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
    shape = CacheShape.read(model) if model else None
    settings = _settings(config, shape)
    column_bytes = shape.column_bytes(block_size) if shape else None
    size = f"budget {config.budget}" if config.budget is not None else f"ratio {config.ratio}"
    table = Table(
        title=f"Columns of {block_size} tokens: {recipe}, {size}, {output_len} generated tokens"
    )
    for name in ("prompt", "dense", "after prompt", "at the end", "at most", "saved"):
        table.add_column(name, justify="right")
    if column_bytes:
        for name in ("dense MiB", "at most MiB"):
            table.add_column(name, justify="right")
    for length in prompt_len:
        table.add_row(*_plan_row(settings, length, output_len, block_size, column_bytes))
    Console().print(table)
    if settings.shares is not None:
        heads = config.allocator.head_shares()
        Console().print(_levels_table(settings, heads, prompt_len, block_size))
    if config.allocator.deals_by_scores:
        Console().print(
            "kv_heads share what their layer keeps, by the scores of each compaction.", style="dim"
        )
    whole = "the prompt itself is processed dense"
    if config.prefill_interval:
        whole = "that of a prompt, while it is processed, is among them"
    Console().print(f"'at most' is reached between two compressions; {whole}.", style="dim")


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


def _plan_row(
    settings: PlanSettings,
    prompt_len: int,
    output_len: int,
    block_size: int,
    column_bytes: int | None,
) -> list[str]:
    """What a layer holds, on the mean over the levels."""
    end = prompt_len + output_len
    dense = -(-end // block_size)
    # One step after the prompt, its columns have been given back.
    decoding = range(min(prompt_len + 2, end), end + 1)
    after_prompt = at_end = at_most = 0.0
    num_layers = sum(count for count, _ in settings.levels())
    for count, of_level in settings.levels():
        plan, part = of_level.plan(prompt_len, block_size, RequestOptions()), count / num_layers
        after_prompt += part * (-(-(prompt_len + 1) // block_size) - plan.columns(prompt_len)[0])
        at_end += part * (dense - plan.columns(end)[0])
        most = max((plan.max_live_columns(n) for n in decoding), default=dense)
        if plan.num_within_prompt:
            most = max(most, plan.max_replay_columns(prompt_len))
        at_most += part * min(dense, most)
    row = [
        f"{prompt_len:,}",
        f"{dense:,}",
        *(_columns(columns) for columns in (after_prompt, at_end, at_most)),
        f"{1 - at_most / dense:.0%}",
    ]
    if column_bytes:
        row += [f"{columns * column_bytes / 2**20:,.1f}" for columns in (dense, at_most)]
    return row


def _columns(mean: float) -> str:
    return f"{mean:,.1f}".removesuffix(".0")


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


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes that ship with this package."""
    table = Table("recipe", "size", "scorer", "allocator", "selector", "merger", "neutral to hits")
    for name in recipes.names():
        config = load_config(name)
        assert config is not None
        size = f"budget {config.budget}" if config.budget is not None else f"ratio {config.ratio}"
        parts = (config.scorer, config.allocator, config.selector, config.merger)
        neutral = "yes" if config.is_neutral_to_hits else "no"
        table.add_row(name, size, *(part.name() for part in parts), neutral)
    Console().print(table)


@app.command()
def show(recipe: Annotated[str, typer.Argument(help="Recipe or YAML file.")]) -> None:
    """Print every setting of a recipe, defaults included, as JSON."""
    config = load_config(recipe)
    if config is None:
        raise ConfigError(f"recipe={recipe!r} compresses nothing: name a recipe.")
    Console().print_json(data=config.to_dict())
    # Beside the JSON, which may be piped into a file.
    Console(stderr=True).print(_neutrality(config), style="dim")


def _neutrality(config: KVCompressionConfig) -> str:
    if config.is_neutral_to_hits:
        return "Hits in the prefix cache, preemptions and chunks change no answer of this recipe."
    return (
        "Which queries score depends on hits in the prefix cache, so answers may, too: set "
        "global_queries to a number and sample_stride to 1 where that must not be."
    )


@app.command()
def version() -> None:
    """Print the version and what was compiled."""
    import ems_vllm

    Console().print_json(data=ems_vllm.build_info())


def main() -> None:
    """Entry point: a wrong setting is answered with one sentence."""
    try:
        app()
    except ConfigError as error:
        Console(stderr=True).print(f"ems-vllm: error: {error}", markup=False, highlight=False)
        raise SystemExit(2) from None
