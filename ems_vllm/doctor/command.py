# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm doctor`, in its two modes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from ems_vllm.config import ConfigError, load_config
from ems_vllm.config.load import DEFAULT_RECIPE
from ems_vllm.config.schema import KVCompressionConfig

_KEY = "VLLM_API_KEY"
_LEVEL = "VLLM_LOGGING_LEVEL"


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    # Everything else belongs to vLLM's own parser.
    settings = {"ignore_unknown_options": True}
    app.command(context_settings=settings)(doctor)


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="A model and arguments, as for `vllm serve`."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Of a running vLLM server: says what limits it.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long a server is watched.")] = 30,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say whether compression can start with these arguments, or whether it would help a server.

    Nothing is loaded, and nothing is asked of a model.

    Exit code 0: it can start, or the server was read. 1: it would be refused. 2: neither is known.
    """
    given = arguments or []
    if url is not None:
        _watch(url, seconds, given, json)
        return
    if not given:
        raise ConfigError("doctor needs a model as `vllm serve` takes it, or --url of a server.")
    _examine(given, json)


def _watch(url: str, seconds: float, arguments: list[str], json: bool) -> None:
    from ems_vllm.doctor.live.reading import read_for
    from ems_vllm.doctor.live.report import live_report
    from ems_vllm.doctor.live.table import print_report

    config = _settings(arguments)
    report = live_report(url, read_for(url, seconds, os.environ.get(_KEY)), config)
    if json:
        Console().print_json(report.model_dump_json())
    else:
        print_report(Console(), report)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"{message}: with --url only --kv-compression and --kv-compression-config are taken, "
            "for the settings to reckon with."
        )


def _settings(arguments: list[str]) -> KVCompressionConfig:
    """With which the gain is reckoned: the default recipe, unless others were given."""
    from ems_vllm.engine.frontend.arguments import add_arguments

    parser = _Parser(prog="ems-vllm doctor", add_help=False, allow_abbrev=False)
    add_arguments(parser).set_defaults(kv_compression=DEFAULT_RECIPE)
    given = parser.parse_args(arguments)
    config = load_config({"recipe": given.kv_compression, **(given.kv_compression_config or {})})
    if config is None:
        raise ConfigError("kv_compression='off' leaves nothing to reckon with: name a recipe.")
    return config


def _examine(arguments: list[str], json: bool) -> None:
    with _quiet(), _output_aside():
        from ems_vllm.doctor.start.examine import examine

        report = examine(arguments)
    if json:
        Console().print_json(report.model_dump_json())
    else:
        from ems_vllm.doctor.start.table import print_report

        print_report(Console(), report)
    if report.status == "refused":
        raise typer.Exit(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """vLLM's log would stand among the checks; it reads its level as it is imported."""
    level = os.environ.get(_LEVEL)
    os.environ[_LEVEL] = level or "ERROR"
    try:
        yield
    finally:
        if level is None:
            del os.environ[_LEVEL]


@contextmanager
def _output_aside() -> Iterator[None]:
    """Whatever vLLM and its libraries print goes to stderr: stdout may be piped into a program."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
