# SPDX-License-Identifier: Apache-2.0
"""Builds the KVCompressionConfig from what an operator typed."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import ems_vllm.policies  # noqa: F401  (registers every component)
from ems_vllm.config import recipes
from ems_vllm.config.errors import ConfigError, from_pydantic, shown
from ems_vllm.config.schema import KEY_PREFIX, KVCompressionConfig
from ems_vllm.keys import CONFIG_KEY

DEFAULT_RECIPE = "ems"
COMPONENTS = ("scorer", "allocator", "selector", "merger")


def parse_overrides(text: str) -> dict[str, Any]:
    """Read `--kv-compression-config`: inline JSON, or the path of a YAML (or JSON) file.

    Raises:
        ConfigError: neither valid JSON for an object nor a readable file.
    """
    stripped = text.strip()
    if not stripped.startswith("{"):
        return recipes.read_file(Path(stripped), "kv_compression_config")
    try:
        data = json.loads(stripped)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"kv_compression_config={shown(text)} is not valid JSON ({error.msg}, column "
            f"{error.colno}): quote the whole object and its keys."
        ) from None
    except (ValueError, RecursionError):
        raise ConfigError(
            f"kv_compression_config={shown(text)} is too much for a JSON parser: give a smaller "
            "number, or nest less."
        ) from None
    return data


def load_config(value: Any) -> KVCompressionConfig | None:
    """The settings that `additional_config["kv_compression"]` describes.

    Args:
        value: None, "off", a recipe's name or file, or a mapping with an optional `recipe` and
            any settings of KVCompressionConfig, which override the recipe's.

    Returns:
        The settings, or None when compression is off.

    Raises:
        ConfigError: with the key, the value and the remedy.
    """
    if value is None or value is False or value == recipes.OFF:
        return None
    if isinstance(value, KVCompressionConfig):
        return value
    if isinstance(value, str):
        value = {"recipe": value}
    if not isinstance(value, dict):
        raise ConfigError(
            f"kv_compression={shown(value)} is not allowed: use {recipes.OFF!r}, a recipe's name, "
            "or a mapping of settings."
        )
    overrides = dict(value)
    recipe = overrides.pop("recipe", DEFAULT_RECIPE)
    if recipe == recipes.OFF:
        if overrides:
            raise ConfigError(
                f"kv_compression_config={shown(overrides)} has no effect: compression is off; "
                f"choose a recipe ({', '.join(recipes.names())}) or drop the settings."
            )
        return None
    if not isinstance(recipe, str):
        raise ConfigError(f"kv_compression={shown(recipe)} is not allowed: give a recipe's name.")
    if _is_complete(overrides):
        return _validate({"recipe": recipe, **overrides})
    return _validate(_merge(recipes.load(recipe), overrides))


def settings_of(vllm_config: Any) -> KVCompressionConfig | None:
    """Settings that a VllmConfig carries, in any process of the engine; None when off.

    Raises:
        ConfigError: as `load_config`, where it was built by hand.
    """
    return load_config((vllm_config.additional_config or {}).get(CONFIG_KEY))


def _is_complete(settings: dict[str, Any]) -> bool:
    """Whether these settings came from `to_dict` and need no recipe to stand on."""
    return set(settings) | {"recipe"} == set(KVCompressionConfig.model_fields)


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides win; options of a component extend the recipe's where its name is kept."""
    merged = {**base, **overrides}
    # Choosing one way to give the size replaces the other one of the recipe.
    if overrides.get("ratio") is not None and "budget" not in overrides:
        merged["budget"] = None
    if overrides.get("budget") is not None and "ratio" not in overrides:
        merged["ratio"] = None
    for key in COMPONENTS:
        old, new = base.get(key), overrides.get(key)
        if isinstance(old, str):
            old = {"name": old}
        if (
            isinstance(new, dict)
            and isinstance(old, dict)
            and new.get("name", old.get("name")) == old.get("name")
        ):
            merged[key] = {**old, **new}
    return merged


def _validate(settings: dict[str, Any]) -> KVCompressionConfig:
    try:
        # Not as keyword arguments: a key of a YAML file need not be a string.
        return KVCompressionConfig.model_validate(settings)
    except ValidationError as error:
        raise from_pydantic(error, KEY_PREFIX, KVCompressionConfig.model_fields) from None
