# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm methods`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ems_vllm.config import ConfigError
from ems_vllm.config.errors import shown
from ems_vllm.methods.measured import MODELS, described
from ems_vllm.methods.method import CODES, Method, method, methods
from ems_vllm.methods.not_served import NOT_SERVED

_GROUPS = {"last": "asked last", "first": "first", "later": "later", "text": "text"}


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("methods")(list_methods)


def list_methods(
    name: Annotated[str | None, typer.Argument(help="One of them, with all that is known.")] = None,
    model: Annotated[
        str, typer.Option(help=f"Whose losses the list shows: {' or '.join(MODELS)}.")
    ] = MODELS[0],
    json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """List the methods that --kv-compression knows, what they need, and what was measured."""
    if model not in MODELS:
        raise ConfigError(f"model={shown(model)} was not measured: use {' or '.join(MODELS)}.")
    console = Console()
    chosen = methods() if name is None else [method(name)]
    if json:
        data = {"methods": [one.to_dict() for one in chosen]}
        if name is None:
            data["not_served"] = [
                {**one._asdict(), "paper": one.paper._asdict()} for one in NOT_SERVED
            ]
        console.print_json(data=data)
    elif name is None:
        console.print(_overview(chosen, model))
        console.print(_note(model), style="dim")
    else:
        console.print(_details(chosen[0]))


def _overview(chosen: list[Method], model: str) -> Table:
    """Narrow enough for a terminal of 80 columns: losses of a budget share a cell."""
    budgets = described(model).get("budgets", [])
    losses_at = (f"loss at {float(budget):.0%}" for budget in budgets)
    table = Table("method", "needs", *losses_at, "time", box=SIMPLE_HEAD, pad_edge=False)
    table.caption = f"loss: {', '.join(_GROUPS.values())}. needs: " + ", ".join(
        f"{code} {need}" for need, code in CODES.items()
    )
    for one in chosen:
        found = one.measured.get(model)
        losses = [
            " ".join(f"{loss:+.1f}" for loss in found.losses[budget].values()) if found else ""
            for budget in budgets
        ]
        time = "" if one.compaction_time is None else f"{one.compaction_time:.2g}"
        table.add_row(one.name, "".join(CODES[need] for need in one.needs), *losses, time)
    return table


def _details(one: Method) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("method", one.name)
    table.add_row("from", one.source)
    table.add_row("what stays", one.keeps)
    for paper in one.papers:
        table.add_row("paper", f"{paper} {paper.url}".strip())
    for part, component in one.parts.items():
        table.add_row(part, component)
    table.add_row("needs", ", ".join(one.needs) or "keys and values alone")
    table.add_row("neutral to hits in the prefix cache", "yes" if one.is_neutral else "no")
    if one.compaction_time is not None:
        table.add_row("time of a compaction", f"{one.compaction_time:.2g} of ems'")
    for found in one.measured.values():
        for budget, losses in found.losses.items():
            text = ", ".join(f"{_GROUPS[group]} {loss:+.2f}" for group, loss in losses.items())
            table.add_row(f"loss at {float(budget):.0%}, {found.model}", text)
    return table


def _note(model: str) -> str:
    found = described(model)
    if not found["recipes"]:
        return "Nothing is measured here."
    return (
        f"Losses of the right answer above the full cache's, nats per token, on {found['model']}: "
        f"{found['what']}. Time: of a compaction, that of ems being 1. Measure your model: "
        "ems-vllm eval. What cannot be served, and why: docs/methods.md, or --json."
    )
