# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm`: look before you serve, and measure what you get."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ems_vllm import plan_command
from ems_vllm.advise import command as advise_command
from ems_vllm.config import ConfigError, load_config
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.doctor import command as doctor_command
from ems_vllm.eval import command as eval_command
from ems_vllm.methods import command as methods_command

app = typer.Typer(
    name="ems-vllm",
    help="KV-cache compression for vLLM: plan capacities, compare methods, evaluate.",
    no_args_is_help=True,
    add_completion=False,
)
plan_command.register(app)
eval_command.register(app)
methods_command.register(app)
doctor_command.register(app)
advise_command.register(app)


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
    if config.when == "pressure":
        return "Whether a request is compressed, and so its answer, depends on what else runs."
    if config.guard_action == "dense":
        return "Whether a request is compressed, and so its answer, depends on those before it."
    if config.is_neutral_to_hits:
        return "Hits in the prefix cache, preemptions and chunks change no answer of this recipe."
    return (
        "Which queries score depends on hits in the prefix cache, so answers may, too: set "
        "global_queries to a number where that must not be."
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
