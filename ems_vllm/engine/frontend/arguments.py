# SPDX-License-Identifier: Apache-2.0
"""The command-line flags of `vllm serve` and where their values go."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ems_vllm.config import ConfigError, load_config, parse_overrides, recipes
from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


class _CommandLineSettings(dict[str, Any]):
    """An `additional_config` that came from a command line.

    The dict itself bears the mark: EngineArgs are rebuilt from their fields (`LLM.from_engine_args`
    does), so they must not carry anything else, and a copy of them is another object.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Other processes may not have loaded this plugin when they read it.
        return dict, (dict(self),)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this package to vLLM's parser."""
    group = parser.add_argument_group(
        title="KVCompression", description="KV-cache compression (ems-vllm)."
    )
    group.add_argument(
        "--kv-compression",
        type=_argument(_recipe),
        default=recipes.OFF,
        metavar=f"{{{recipes.OFF},{','.join(recipes.names())},FILE.yaml}}",
        help="Recipe that compresses the KV cache of long requests, or a YAML file with one.",
    )
    group.add_argument(
        "--kv-compression-config",
        type=_argument(parse_overrides),
        default=None,
        metavar="JSON|FILE.yaml",
        help="Settings that override the recipe's, for example '{\"budget\": 1024}'.",
    )
    return parser


def store_arguments(engine_args: EngineArgs, args: argparse.Namespace) -> EngineArgs:
    """Carry the flags in `additional_config`, so that they reach every process and the hash."""
    recipe = getattr(args, "kv_compression", recipes.OFF)
    overrides = getattr(args, "kv_compression_config", None)
    additional = _CommandLineSettings(engine_args.additional_config or {})
    if recipe != recipes.OFF or overrides is not None:
        with answer_mistakes(additional):
            config = load_config({"recipe": recipe, **(overrides or {})})
        if config is not None:
            additional[CONFIG_KEY] = config.to_dict()
            # Further API server processes are started with these arguments and build their
            # EngineArgs before this plugin is loaded there; additional_config is a field that
            # they know.
            args.additional_config = additional
    # Whichever flag the settings come from: --additional-config can hold them, too.
    if CONFIG_KEY in additional:
        engine_args.additional_config = additional
    return engine_args


@contextmanager
def answer_mistakes(additional_config: Any) -> Iterator[None]:
    """End the process with one sentence if settings from the command line are wrong.

    Settings from Python raise ConfigError, as an exception is what a caller can handle there.

    Args:
        additional_config: Of the EngineArgs that hold the settings.
    """
    try:
        yield
    except ConfigError as error:
        if isinstance(additional_config, _CommandLineSettings):
            raise SystemExit(f"vllm: error: {error}") from None
        raise


def _recipe(value: str) -> str:
    if value != recipes.OFF:
        recipes.load(value)
    return value


def _argument(parse: Any) -> Any:
    """`parse` as an argparse type whose errors are shown as they are."""

    def convert(value: str) -> Any:
        try:
            return parse(value)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    convert.__name__ = parse.__name__
    return convert
