# SPDX-License-Identifier: Apache-2.0
"""Arguments of `vllm serve`, read by vLLM's own parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.config import ConfigError, KVCompressionConfig
from ems_vllm.config.load import DEFAULT_RECIPE
from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


@dataclass(frozen=True)
class ServeArguments:
    """What a server would be started with.

    Attributes:
        engine_args: With the settings of compression written out.
        config: These settings; None where compression was switched off.
        recipe_is_assumed: Whether no recipe was named.
        has_metrics: Whether the server counts what it does.
    """

    engine_args: EngineArgs
    config: KVCompressionConfig | None
    recipe_is_assumed: bool
    has_metrics: bool


def read_arguments(arguments: Sequence[str]) -> ServeArguments:
    """Read them as `vllm serve` does.

    Raises:
        SystemExit: with 2, after a line on stderr: vLLM's parser does not take them.
        ConfigError: the settings of compression are wrong.
        Exception: vLLM's own, where arguments do not go together.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from ems_vllm.engine.frontend.switch_on import write_out_settings

    args = _parse(arguments)
    is_assumed = _assume_a_recipe(args)
    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
    except SystemExit as error:
        # So `vllm serve` ends where the settings are wrong.
        raise ConfigError(str(error.code).removeprefix("vllm: error: ")) from None
    additional = engine_args.additional_config
    config = write_out_settings(engine_args) if CONFIG_KEY in (additional or {}) else None
    return ServeArguments(
        engine_args=engine_args,
        config=config,
        recipe_is_assumed=is_assumed,
        has_metrics=not engine_args.disable_log_stats,
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="ems-vllm doctor")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser")).set_defaults(
        kv_compression=None
    )
    args: argparse.Namespace = parser.parse_args([command.name, *arguments])
    command.validate(args)
    if args.model_tag is not None:
        args.model = args.model_tag
    return args


def _assume_a_recipe(args: argparse.Namespace) -> bool:
    """Name the default one where nothing was said of compression; settings alone are a mistake."""
    is_named = args.kv_compression is not None
    if is_named or CONFIG_KEY in (args.additional_config or {}):
        args.kv_compression = args.kv_compression or "off"
        return False
    if args.kv_compression_config is not None:
        args.kv_compression = "off"
        return False
    args.kv_compression = DEFAULT_RECIPE
    return True
