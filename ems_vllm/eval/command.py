# SPDX-License-Identifier: Apache-2.0
"""The commands `ems-vllm score` and `ems-vllm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval import exchange
from ems_vllm.eval.budget import Budget
from ems_vllm.eval.results import MethodResult


def score(
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    answers: Annotated[Path, typer.Option(help="JSON lines, one for every prompt.")],
    output: Annotated[Path, typer.Option(help="Write the result here, JSON.")],
    method: Annotated[str, typer.Option(help="Name of the method, or full.")],
    engine: Annotated[str, typer.Option(help="Library that ran it.")],
    budget: Annotated[
        str, typer.Option(help="Entries per kv_head, a fraction of the length, or full.")
    ] = "full",
    model: Annotated[str, typer.Option(help="Name of the model.")] = "",
) -> None:
    """Score the answers of another engine to exported prompts."""
    parsed = Budget.parse(budget)
    described = MethodResult(
        method=method, engine=engine, budget=parsed.count, budget_fraction=parsed.fraction
    )
    result = exchange.score(prompts, answers, model=model, method=described)
    output.parent.mkdir(parents=True, exist_ok=True)
    result.write(output)
    Console().print(f"{len(result.methods[0].samples):,} answers scored: {output}")


def report(
    results: Annotated[list[Path], typer.Argument(help="Results of `eval` and `score`, JSON.")],
    output: Annotated[Path, typer.Option(help="Folder for the report.")],
) -> None:
    """Compare results in one report: HTML, Markdown, JSON."""
    # Imported here: plotting takes seconds to load.
    from ems_vllm.eval.report import write_report

    write_report([read_result(path) for path in results], output)
    Console().print(f"Report: {output}")


def read_result(path: Path) -> exchange.EvalResult:
    """A result's file; ConfigError where it is none."""
    try:
        return exchange.EvalResult.read(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not the JSON of a result"
        raise ConfigError(
            f"results={shown(str(path))} cannot be read ({reason}): give a file that "
            "`ems-vllm eval` or `ems-vllm score` wrote."
        ) from None


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(score)
    app.command()(report)
