# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm methods`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ems_vllm.methods.measured import described
from ems_vllm.methods.method import CODES, Method, method, methods
from ems_vllm.methods.not_served import NOT_SERVED

_GROUPS = {"last": "asked last", "first": "first", "later": "later", "text": "text"}


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("methods")(list_methods)


def list_methods(
    name: Annotated[str | None, typer.Argument(help="One of them, with all that is known.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """List the methods that --kv-compression knows, what they need, and what was measured."""
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
        console.print(_overview(chosen))
        console.print(_note(), style="dim")
    else:
        console.print(_details(chosen[0]))


def _overview(chosen: list[Method]) -> Table:
    """Narrow enough for a terminal of 80 columns: losses of a budget share a cell."""
    budgets = described().get("budgets", [])
    losses_at = (f"loss at {float(budget):.0%}" for budget in budgets)
    table = Table("method", "needs", *losses_at, "time", box=SIMPLE_HEAD, pad_edge=False)
    table.caption = f"loss: {', '.join(_GROUPS.values())}. needs: " + ", ".join(
        f"{code} {need}" for need, code in CODES.items()
    )
    for one in chosen:
        measured = one.measured
        losses = [
            " ".join(f"{loss:+.1f}" for loss in measured.losses.get(budget, {}).values())
            if measured
            else ""
            for budget in budgets
        ]
        time = "" if measured is None or measured.cost is None else f"{measured.cost:.2g}"
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
    if one.measured is not None:
        for budget, losses in one.measured.losses.items():
            text = ", ".join(f"{_GROUPS[group]} {_signed(loss)}" for group, loss in losses.items())
            table.add_row(f"loss at {float(budget):.0%}", text)
    return table


def _note() -> str:
    found = described()
    if not found["recipes"]:
        return "Nothing is measured here."
    return (
        f"Losses of the right answer above the full cache's, nats per token, on {found['model']}: "
        f"{found['what']}. Time: of a compaction, that of ems being 1. Measure your model: "
        "ems-vllm eval. What cannot be served, and why: docs/methods.md, or --json."
    )


def _signed(loss: float | None) -> str:
    return "" if loss is None else f"{loss:+.2f}"
