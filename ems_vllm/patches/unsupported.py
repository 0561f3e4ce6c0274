# SPDX-License-Identifier: Apache-2.0
"""What is left of this package on a vLLM it was not written for: a refusal.

Without it the flag would be unknown, and `LLM(additional_config=...)` silently uncompressed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches.record import Patch, PatchError

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def refuse_compression(error: PatchError) -> None:
    """Answer every wish for compression with `error`; everything else runs as vLLM alone.

    Raises:
        PatchError: vLLM has not even the functions that this hangs on.
    """
    for patch in _refusals(error):
        patch.apply()


def _refusals(error: PatchError) -> tuple[Patch, ...]:
    class Refuse(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
            parser.error(str(error))

    def wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = original(parser)
            for flag in ("--kv-compression", "--kv-compression-config"):
                parser.add_argument(flag, action=Refuse, help=argparse.SUPPRESS)
            return parser

        return add_cli_args

    def wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
            if CONFIG_KEY in (self.additional_config or {}):
                raise error
            return original(self, *args, **kwargs)

        return create_engine_config

    wraps = {
        "add_cli_args": wrap_add_cli_args,
        "create_engine_config": wrap_create_engine_config,
    }
    return tuple(
        Patch(
            target=f"vllm.engine.arg_utils:EngineArgs.{name}",
            wrap=wrap,
            vllm="",
            source_sha256={},
            reason="Compression must be refused rather than ignored.",
            remove_when="ems-vllm supports this vLLM",
        )
        for name, wrap in wraps.items()
    )
