# SPDX-License-Identifier: Apache-2.0
"""Runs a function as a command of its own, `python -m ...` or a script."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from ems_vllm.config.errors import ConfigError


def run_script(main: Callable[..., None]) -> None:
    """Take the arguments from the command line; a wrong one is answered with one sentence."""
    try:
        typer.run(main)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
