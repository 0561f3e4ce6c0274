# SPDX-License-Identifier: Apache-2.0
"""The commands `ems-vllm eval`, `score`, `report` and `calibrate`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.calibration.command import calibrate
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.results import EvalResult, MethodResult

_T = TypeVar("_T")


def evaluate(
    model: Annotated[str, typer.Argument(help="As for `vllm serve`, or its name at --base-url.")],
    preset: Annotated[str, typer.Option(help="smoke, tiny, standard, full, or a YAML file.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers and results; a run goes on there.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="A running server; without it, one is started per recipe.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub name, where the model's name is neither.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated, as the next six.")] = None,
    protocols: Annotated[
        str | None, typer.Option(help="Where the question stands: last, first, later.")
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Methods beside the full cache.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Entries per kv_head, or fractions of the length.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Context lengths in tokens.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Each gives samples of its own.")] = None,
    depths: Annotated[str | None, typer.Option(help="0 (start) to 1 (end).")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="A task, length and seed.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Upper bound of every task's generation length.")
    ] = None,
    prompt_format: Annotated[
        str | None, typer.Option(help="completion, or chat: in the model's chat template.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time.")] = None,
    text_path: Annotated[Path | None, typer.Option(help="Text for haystacks.")] = None,
    data_path: Annotated[Path | None, typer.Option(help="Folder of public data sets.")] = None,
    server_args: Annotated[
        str | None, typer.Option(help="Further arguments of `vllm serve`, in one string.")
    ] = None,
    export_prompts: Annotated[
        Path | None, typer.Option(help="Write the prompts here for other engines; ask nothing.")
    ] = None,
) -> None:
    """Measure quality, memory and speed of recipes and budgets against the full cache."""
    # Imported here: the other commands need neither a client nor tokenizers.
    try:
        from ems_vllm.eval.questions.tokenizer import HubTokenizer
        from ems_vllm.eval.records import preset as presets
        from ems_vllm.eval.records import prompt_files
        from ems_vllm.eval.records.run_folder import RunFolder
        from ems_vllm.eval.report.summary import print_summary
        from ems_vllm.eval.server.evaluation import Evaluation
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`ems-vllm eval` needs the package {error.name}: pip install 'ems-vllm[eval]'."
        ) from None

    overrides: dict[str, Any] = {
        "tasks": _listed(tasks, "tasks", str),
        "protocols": _listed(protocols, "protocols", str),
        "recipes": _listed(recipes, "recipes", str),
        "budgets": _listed(budgets, "budgets", _number),
        "lengths": _listed(lengths, "lengths", int),
        "seeds": _listed(seeds, "seeds", int),
        "depths": _listed(depths, "depths", float),
        "samples": samples,
        "max_tokens": max_tokens,
        "prompt_format": prompt_format,
        "concurrency": concurrency,
        "text_path": text_path,
        "data_path": data_path,
    }
    chosen = presets.load(preset, overrides)
    chosen = chosen.with_command_line(
        lengths=lengths is not None, samples=samples is not None, args=_words(server_args)
    )
    console = Console()
    evaluation = Evaluation(
        model=model,
        tokenizer=HubTokenizer(tokenizer or model, chosen.prompt_format),
        tokenizer_name=tokenizer or model,
        preset=chosen,
        folder=RunFolder(output or Path()),
        base_url=base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
        console=console,
    )
    if export_prompts is not None:
        count = prompt_files.export(evaluation.samples(), export_prompts)
        console.print(f"{count:,} prompts: {export_prompts}", highlight=False)
        return
    if output is None:
        raise ConfigError("output is missing: name a folder with --output.")
    result = evaluation()
    print_summary(console, result)
    _write_report([result], output, console)


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
    from ems_vllm.eval.records.scoring import score_files

    parsed = Budget.parse(budget)
    described = MethodResult(
        method=method, engine=engine, budget=parsed.count, budget_fraction=parsed.fraction
    )
    result = score_files(prompts, answers, model=model, method=described)
    output.parent.mkdir(parents=True, exist_ok=True)
    result.write(output)
    Console().print(f"{len(result.methods[0].samples):,} answers scored: {output}")


def report(
    results: Annotated[list[Path], typer.Argument(help="Results of `eval` and `score`, JSON.")],
    output: Annotated[Path, typer.Option(help="Folder for the report.")],
) -> None:
    """Compare results in one report: HTML, Markdown, JSON."""
    from ems_vllm.eval.report import write_report

    write_report([read_result(path) for path in results], output)
    Console().print(f"Report: {output}")


def read_result(path: Path) -> EvalResult:
    """A result's file; ConfigError where it is none."""
    try:
        return EvalResult.read(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not the JSON of a result"
        raise ConfigError(
            f"results={shown(str(path))} cannot be read ({reason}): give a file that "
            "`ems-vllm eval` or `ems-vllm score` wrote."
        ) from None


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("eval")(evaluate)
    app.command()(score)
    app.command()(report)
    app.command()(calibrate)


def _write_report(results: list[EvalResult], output: Path, console: Console) -> None:
    """The report, if what draws it is installed; the results are on disk in any case."""
    from ems_vllm.eval.report import write_report

    console.print(f"Results: {output / 'results.json'}", highlight=False)
    try:
        write_report(results, output)
    except ConfigError as error:
        console.print(f"No report: {error}", highlight=False, markup=False)
    else:
        console.print(f"Report: {output / 'report.html'}", highlight=False)


def _listed(text: str | None, option: str, convert: Callable[[str], _T]) -> list[_T] | None:
    if text is None:
        return None
    try:
        return [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"{option}={shown(text)} is not allowed: separate numbers with commas."
        ) from None


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _words(text: str | None) -> list[str] | None:
    try:
        return None if text is None else shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"server_args={shown(text)} cannot be read ({error}): quote it."
        ) from None
