# SPDX-License-Identifier: Apache-2.0
"""Goes through a start as `vllm serve` does, up to where weights would be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ems_vllm.config import ConfigError, KVCompressionConfig
from ems_vllm.config.errors import shown
from ems_vllm.doctor.start.arguments import ServeArguments, read_arguments
from ems_vllm.doctor.start.bare_model import build
from ems_vllm.doctor.start.check import (
    Capacity,
    Check,
    StartReport,
    Status,
    refused,
    sentence,
    unknown,
    worst,
)
from ems_vllm.doctor.start.features import CHECK_OF, features
from ems_vllm.doctor.start.installed import installed
from ems_vllm.doctor.start.layers import check_layers
from ems_vllm.doctor.start.memory import check_memory
from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def examine(arguments: Sequence[str]) -> StartReport:
    """Whether `vllm serve` with these arguments starts, what it loses, and what fits.

    Args:
        arguments: As of `vllm serve`.

    Raises:
        SystemExit: with 2: vLLM's parser does not take them.
        ConfigError: the model cannot be read, or compression is off.
    """
    checks = list(installed())
    if worst(checks) is Status.REFUSED:
        return StartReport(status=Status.REFUSED, checks=tuple(checks))
    try:
        serve = read_arguments(arguments)
    except ConfigError as error:
        checks.append(refused("settings", error))
        return StartReport(status=Status.REFUSED, checks=tuple(checks))
    except Exception as error:
        _say_what_is_missing(error, arguments)
        checks.append(refused("arguments", sentence(error)))
        return StartReport(status=Status.REFUSED, checks=tuple(checks))
    if serve.config is None:
        raise ConfigError(
            "kv_compression='off' leaves nothing to look at: name a recipe, or leave the flag out."
        )
    more, capacity = _of_arguments(serve, serve.config)
    # The configuration may be in the way of what is installed.
    names = {check.name for check in more}
    checks = [*(check for check in checks if check.name not in names), *more]
    return StartReport(
        model=serve.engine_args.model,
        recipe=serve.config.recipe,
        recipe_is_assumed=serve.recipe_is_assumed,
        status=worst(checks),
        checks=tuple(checks),
        capacity=capacity,
    )


def _of_arguments(
    serve: ServeArguments, config: KVCompressionConfig
) -> tuple[list[Check], Capacity | None]:
    try:
        vllm_config = _configuration(serve)
    except Exception as error:
        # vLLM's own refusals are of many types.
        _say_what_is_missing(error, [serve.engine_args.model])
        return [refused("configuration", sentence(error))], None
    checks = _configured(vllm_config, config, serve.has_metrics)
    if worst(checks) is Status.REFUSED:
        return [*checks, *_not_looked_at("attention", "layers", "memory")], None
    return _of_model(vllm_config, serve.engine_args, config, checks)


def _say_what_is_missing(error: Exception, arguments: Sequence[str]) -> None:
    """Where a model's files are what could not be had.

    Raises:
        ConfigError: so it is.
    """
    from huggingface_hub.errors import HFValidationError

    model = next((one for one in arguments if not one.startswith("-")), "")
    if isinstance(error, OSError | HFValidationError) and not Path(model).exists():
        raise ConfigError(
            f"model={shown(model)} cannot be read: there is no such folder, and its config.json is "
            f"neither in the hub's cache nor to be had from the hub ({type(error).__name__}); "
            "download the model first, or name a folder."
        ) from None


def _not_looked_at(*names: str) -> Iterator[Check]:
    for name in names:
        yield unknown(name, "not looked at", "mend what is refused first")


def _configuration(serve: ServeArguments) -> VllmConfig:
    """vLLM's, as if nobody had asked for compression yet: all that is in its way is to be named."""
    args = serve.engine_args
    additional = args.additional_config
    args.additional_config = {k: v for k, v in additional.items() if k != CONFIG_KEY}
    try:
        vllm_config = args.create_engine_config()
    finally:
        args.additional_config = additional
    vllm_config.additional_config = additional
    return vllm_config


def _configured(
    vllm_config: VllmConfig, config: KVCompressionConfig, has_metrics: bool
) -> list[Check]:
    """Features, and in their places what is refused of them."""
    from ems_vllm.engine.frontend.compatibility import refusals

    found: dict[str, list[Check]] = {}
    for key, error in refusals(vllm_config, config):
        name = CHECK_OF.get(key, key)
        found.setdefault(name, []).append(refused(name, error))
    # What an allocator that does not fit the model keeps cannot be said.
    on = features(vllm_config, config, has_metrics, with_budget="budget" not in found)
    checks = [check for one in on for check in found.pop(one.name, [one])]
    return [*checks, *(check for rest in found.values() for check in rest)]


def _of_model(
    vllm_config: VllmConfig,
    engine_args: EngineArgs,
    config: KVCompressionConfig,
    checks: list[Check],
) -> tuple[list[Check], Capacity | None]:
    """What takes vLLM's class of the model."""
    from ems_vllm.engine.frontend.switch_on import activate

    try:
        activate(vllm_config, config)
    except ConfigError as error:
        return [*checks, refused("vllm", error)], None
    try:
        bare = build(engine_args, vllm_config, config.allocator.deals_to_heads)
    except ValueError as error:
        # So vLLM refuses what its models and backends cannot do.
        return [*checks, refused("attention", sentence(error))], None
    except Exception as error:
        finding = f"vLLM cannot build this model without weights here ({sentence(error)})"
        remedy = "the server says at start-up which are compressed, and what fits"
        return [*checks, unknown("layers", finding, remedy)], None
    of_layers = list(check_layers(bare, config))
    checks = [*checks, *of_layers]
    if worst(of_layers) is Status.REFUSED:
        return [*checks, *_not_looked_at("memory")], None
    memory, capacity = check_memory(bare, vllm_config, config)
    return [*checks, memory], capacity
