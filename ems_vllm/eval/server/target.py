# SPDX-License-Identifier: Apache-2.0
"""A server to ask: one that runs already, or one that is started for a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.server.process import Server


@dataclass(frozen=True)
class Target:
    """A server to ask.

    Attributes:
        is_alive: Whether it still can answer.
    """

    url: str
    is_alive: Callable[[], bool]


@contextmanager
def running(url: str) -> Iterator[Target]:
    """A server that others started and will stop."""
    yield Target(url, lambda: True)


@contextmanager
def started(
    model: str, args: Sequence[str], log: Path, remark: str, console: Console
) -> Iterator[Target]:
    """A server of our own; it ends with the context.

    Args:
        model, args: Of `vllm serve`.
        log: File for what it prints.
        remark: What is said on a terminal until it answers.

    Raises:
        ConfigError: it did not start.
    """
    server = Server(model, args, log)
    status: AbstractContextManager[Any] = nullcontext()
    if console.is_terminal:
        status = console.status(remark)
    try:
        with status:
            server.__enter__()
    except (RuntimeError, TimeoutError):
        lines = server.log().strip().splitlines()
        raise ConfigError(
            f"model={shown(model)}: `{' '.join(server.command)}` did not start; its log "
            f"{shown(str(log))} ends with: {lines[-1] if lines else 'nothing'}"
        ) from None
    try:
        yield Target(server.url, server.is_alive)
    finally:
        server.stop()
