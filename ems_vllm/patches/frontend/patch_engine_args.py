# SPDX-License-Identifier: Apache-2.0
"""EngineArgs: the command-line flags, and the moment when a configuration is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.keys import CONFIG_KEY
from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    import argparse

    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_ARGUMENTS = "#40824 (closed): arguments of out-of-tree platforms, not of general plugins"


def _wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        from ems_vllm.engine.frontend.arguments import add_arguments

        return add_arguments(original(parser))

    return add_cli_args


def _wrap_from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        from ems_vllm.engine.frontend.arguments import store_arguments

        return store_arguments(original(cls, args), args)

    return from_cli_args


def _wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        additional = self.additional_config
        if not isinstance(additional, dict) or CONFIG_KEY not in additional:
            return original(self, *args, **kwargs)
        from ems_vllm.engine.frontend.arguments import answer_mistakes
        from ems_vllm.engine.frontend.switch_on import activate, write_out_settings

        with answer_mistakes(additional):
            config = write_out_settings(self)
        vllm_config = original(self, *args, **kwargs)
        if config is not None:
            with answer_mistakes(additional):
                activate(vllm_config, config)
        return vllm_config

    return create_engine_config


PATCHES = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        wrap=_wrap_add_cli_args,
        source_sha256=by_version(
            "0b7444570415c68c90cbf8636cc15988c3bab33438acd65dbc75c26c125e5cba",
            "28ea69a1405b70eed2ceb817ce6258d149b83195130286c586ae828bd7f6ed3b",
        ),
        process=Process.FRONTEND,
        reason="A general plugin cannot add arguments to the parser of `vllm serve`.",
        upstream=_ARGUMENTS,
        remove_when="vLLM lets general plugins extend the argument parser",
        always=True,
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        wrap=_wrap_from_cli_args,
        source_sha256=by_version(
            "51a013f61829ac5c0f4f2259d8dba5803bcd0b66b4bcad8071b2733c09be6a43"
        ),
        process=Process.FRONTEND,
        reason="Arguments that are no fields of EngineArgs are lost; ours go to additional_config.",
        upstream=_ARGUMENTS,
        remove_when="vLLM lets general plugins extend the argument parser",
        always=True,
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        wrap=_wrap_create_engine_config,
        source_sha256=by_version(
            "b9b94288f46d2f679c3f30825ddd2eb3b1f6a9958115c80505c4c948b972150f",
            "1f916622074963ee1d18464914782146a7f5ea52cd3a959a2c74acefd3db8e63",
        ),
        process=Process.FRONTEND,
        reason=(
            "Only a platform may check and update a complete VllmConfig; on CUDA that is vLLM's "
            "own. Here the settings are validated and the compressing worker class is chosen."
        ),
        upstream="none filed; RFC #19161 (open) asks for hooks of out-of-tree code in general",
        remove_when="general plugins get a check_and_update_config hook",
        always=True,
    ),
)
