# SPDX-License-Identifier: Apache-2.0
"""The page of the command line: every command and flag of `ems-vllm`, and ours of `vllm serve`."""

from __future__ import annotations

import argparse
import inspect
import types
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from tables.markdown import table
from typer.models import ArgumentInfo, OptionInfo

from ems_vllm.cli import app
from ems_vllm.engine.frontend.arguments import add_arguments

# Of a type, as a reader names it.
_KINDS = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def page() -> str:
    return "\n".join([*_SERVE, _serve(), "", *_BETWEEN, *_commands()])


def _serve() -> str:
    """Flags that the package adds to every command of vLLM that starts an engine."""
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    rows = []
    for action in parser._actions:
        default = "" if action.default is None else f"`{action.default}`"
        rows.append([f"`{action.option_strings[0]}`", _escaped(str(action.help)), default])
    return table(["flag", "meaning", "default"], rows)


def _commands() -> list[str]:
    lines = []
    callbacks = {
        info.name or (info.callback.__name__ if info.callback else ""): info.callback
        for info in app.registered_commands
    }
    for name, callback in sorted(callbacks.items()):
        assert callback is not None
        lines += [f"## ems-vllm {name}", "", *_paragraphs(callback.__doc__ or ""), ""]
        params = _parameters(callback)
        words = [param.usage for param in params if param.is_argument or param.required]
        if not all(param.is_argument or param.required for param in params):
            words.append("[OPTIONS]")
        lines += [f"    {' '.join(['ems-vllm', name, *words])}", ""]
        if params:
            rows = [[f"`{param.usage}`", param.meaning, param.default] for param in params]
            lines += [table(["", "meaning", "default"], rows), ""]
    return lines[:-1]


class _Parameter:
    """One argument or option, as it is written and what its signature says of it.

    Args:
        name: Of the function's parameter.
        info: What it is annotated with.
        kind: Its type, as written.
        default: Of the signature.
    """

    def __init__(self, name: str, info: Any, kind: Any, default: Any) -> None:
        self.is_argument = isinstance(info, ArgumentInfo)
        self.required = default is inspect.Parameter.empty
        options = [one for one in get_args(kind) if one is not types.NoneType]
        is_list = get_origin(kind) is list
        one = options[0] if options and (is_list or _is_union(kind)) else kind
        if get_origin(one) is list:
            (one,) = get_args(one)
        if self.is_argument:
            word = name.upper() + ("..." if is_list else "")
            self.usage = word if self.required else f"[{word}]"
        else:
            flag = next(iter(info.param_decls or ()), f"--{name.replace('_', '-')}")
            self.usage = flag if one is bool else f"{flag} {_kind(one)}"
        text = info.help or ""
        if info.min:
            text = f"{text.removesuffix('.')}; at least {info.min}."
        self.meaning = _escaped(text)
        self.default = "required" if self.required else _default(default)


def _parameters(callback: Callable[..., Any]) -> list[_Parameter]:
    """Of a command, arguments first."""
    found = []
    for name, param in inspect.signature(callback, eval_str=True).parameters.items():
        kind, info = param.annotation, None
        if get_origin(kind) is Annotated:
            kind, info = get_args(kind)[:2]
        found.append(_Parameter(name, info or OptionInfo(), kind, param.default))
    return sorted(found, key=lambda one: not one.is_argument)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (types.UnionType, Union)


def _kind(kind: Any) -> str:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "NAME"
    return _KINDS[kind]


def _default(value: Any) -> str:
    if value is None or value is False or value == "":
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _paragraphs(text: str) -> list[str]:
    """A docstring with one sentence per line, as prose stands in pages."""
    joined = " ".join(inspect.cleandoc(text).split())
    return joined.replace(". ", ".\n").splitlines()


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_SERVE = [
    "# Command line",
    "",
    "## vllm serve",
    "",
    "The package adds two flags to every command of vLLM that starts an engine (`vllm serve`, "
    "`vllm bench`, ...) and takes none away.",
    "What they may hold is on the page of [settings](configuration.md).",
    "",
]

_BETWEEN = [
    "A wrong value ends the start with one sentence; see [troubleshooting](troubleshooting.md).",
    "",
    "    vllm serve MODEL --kv-compression ems --kv-compression-config '{\"budget\": 1024}'",
    "",
    "`ems-vllm` looks before you serve, and measures what you get.",
    "No command needs a GPU; `eval` needs vLLM, where it is given no `--base-url`, and "
    "`calibrate` and the sample of `advise` torch.",
    "`eval`, `calibrate` and `advise`, where it is given texts, need what "
    "`pip install 'ems-vllm[eval]'` brings, and `report` what `ems-vllm[report]` does.",
    "",
]
