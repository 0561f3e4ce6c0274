# SPDX-License-Identifier: Apache-2.0
"""What is left of this package on a vLLM it was not written for: a refusal.

Without it the flag would be unknown, and `LLM(additional_config=...)` silently uncompressed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches.record import Patch, PatchError, Process

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

# A child of vLLM's logger, so that its settings apply.
logger = logging.getLogger("vllm.ems")


def refuse_compression(cause: Exception) -> None:
    """Answer every wish for compression with `cause`; everything else runs as vLLM alone.

    Args:
        cause: Why the package cannot be used: a PatchError is shown as it stands.
    """
    if isinstance(cause, PatchError):
        error = cause
        logger.warning("KV-cache compression is not available: %s", error)
    else:
        error = PatchError(
            f"KV-cache compression is not available, because ems-vllm failed with {cause!r} when "
            "vLLM loaded it: see the log above for where, or start without --kv-compression."
        )
        logger.warning("%s", error, exc_info=cause)
    for patch in _refusals(error):
        try:
            patch.apply()
        except Exception as another:
            # Where the others hold, they refuse.
            logger.warning("A wish for KV-cache compression may go unheard: %s", another)


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

    def wrap_executor(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            if CONFIG_KEY in (vllm_config.additional_config or {}):
                raise error
            original(self, vllm_config, *args, **kwargs)

        return __init__

    wraps = {
        "vllm.engine.arg_utils:EngineArgs.add_cli_args": wrap_add_cli_args,
        "vllm.engine.arg_utils:EngineArgs.create_engine_config": wrap_create_engine_config,
        "vllm.v1.executor.abstract:Executor.__init__": wrap_executor,
    }
    return tuple(
        Patch(
            target=target,
            wrap=wrap,
            vllm="",
            source_sha256={},
            process=Process.FRONTEND,
            reason="Compression must be refused rather than ignored.",
            upstream="none: it is about this package",
            remove_when="ems-vllm supports this vLLM",
        )
        for target, wrap in wraps.items()
    )
