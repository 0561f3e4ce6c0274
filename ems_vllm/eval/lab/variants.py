# SPDX-License-Identifier: Apache-2.0
"""What an ablation compares: `configs/lab/*.yaml`, or a file of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ems_vllm.config import ConfigError, KVCompressionConfig, profiles, recipes
from ems_vllm.config.errors import from_pydantic, shown
from ems_vllm.eval.lab.sizes import ByteBudget, Size
from ems_vllm.eval.records.method import FULL
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.transformers_engine.quantised import PLAIN, cache_format
from ems_vllm.eval.transformers_engine.server_config import server_config

_SIZES = ("budget", "ratio", "max_budget")


class Variant(BaseModel):
    """One row of an ablation.

    Attributes:
        name: Of the row.
        recipe: Name of a recipe, or its file; "full" keeps every entry.
        settings: Of KVCompressionConfig, instead of the recipe's.
        kv_cache_dtype: As --kv-cache-dtype of vLLM.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    recipe: str = "ems"
    settings: dict[str, Any] = {}
    kv_cache_dtype: str = PLAIN

    @property
    def is_full(self) -> bool:
        """Whether it has one size only."""
        return self.recipe == FULL


def names() -> list[str]:
    """Sets of variants that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir())


def read_variants(name: str) -> list[Variant]:
    """The variants of a set.

    Args:
        name: A shipped one, or the path of a YAML file with a list of variants.

    Raises:
        ConfigError: there is no such set, or it is not what it should be.
    """
    if name in names():
        with resources.as_file(_folder() / f"{name}.yaml") as path:
            entries = recipes.read_list(path, "variants")
    elif name.endswith((".yaml", ".yml")):
        entries = recipes.read_list(Path(name), "variants")
    else:
        raise ConfigError(
            f"variants={shown(name)} is not a set of variants: use {', '.join(names())}, or the "
            "path of a .yaml file."
        )
    variants: dict[str, Variant] = {}
    for index, entry in enumerate(entries):
        variant = _variant(entry, f"variants[{index}].")
        if variant.name in variants:
            raise ConfigError(
                f"variants[{index}].name={shown(variant.name)} is there twice: give each variant "
                "a name of its own."
            )
        variants[variant.name] = variant
    if not variants:
        raise ConfigError(f"variants={shown(name)} holds none: write at least one.")
    return list(variants.values())


def _variant(entry: Any, prefix: str) -> Variant:
    try:
        variant = Variant.model_validate(entry)
    except ValidationError as error:
        raise from_pydantic(error, prefix, Variant.model_fields) from None
    try:
        cache_format(variant.kv_cache_dtype)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None
    if variant.is_full and variant.settings:
        raise ConfigError(
            f"{prefix}settings={shown(variant.settings)} would change nothing: name a recipe "
            f"other than {FULL}, or leave them out."
        )
    for key in _SIZES:
        if key in variant.settings:
            raise ConfigError(
                f"{prefix}settings.{key}={shown(variant.settings[key])} is not allowed: sizes "
                "come from --budgets."
            )
    return variant


def configured(
    variants: Sequence[Variant],
    sizes: Sequence[Size],
    prompts: Sequence[PromptLine],
    overrides: dict[str, Any],
    block_size: int,
) -> dict[str, KVCompressionConfig]:
    """Settings of a server for each variant, by its name.

    Args:
        variants: What is compared.
        sizes: All that requests will ask for.
        prompts: Their lengths decide about the largest request.
        overrides: Of KVCompressionConfig, for every variant; its own settings win.
        block_size: Of the server.

    Raises:
        ConfigError: a setting is wrong.
    """
    largest = max((_total(size, prompt) for size in sizes for prompt in prompts), default=1)
    configs = {}
    for variant in variants:
        settings = {**overrides, **variant.settings}
        try:
            config = server_config(variant.recipe, largest, settings, block_size)
        except ConfigError as error:
            raise ConfigError(f"variant {shown(variant.name)}: {error}") from None
        configs[variant.name] = config
    return configs


def described(variant: Variant, config: KVCompressionConfig) -> dict[str, Any]:
    """All that makes a variant what it is, for a result."""
    settings: dict[str, Any] = {"recipe": FULL} if variant.is_full else config.to_dict()
    allocator = variant.settings.get("allocator")
    if isinstance(allocator, dict) and allocator.get("profile") in profiles.names():
        # Its content ships with the commit that the result names.
        settings["allocator"] = {**settings["allocator"], "profile": allocator["profile"]}
    return {**settings, "kv_cache_dtype": variant.kv_cache_dtype}


def _total(size: Size, prompt: PromptLine) -> int:
    """No fewer entries than the prompt may ask for."""
    if isinstance(size, ByteBudget):
        return len(prompt.prompt_token_ids)
    return size.total(prompt.budget_length) or 1


def _folder() -> Any:
    return resources.files("ems_vllm.configs") / "lab"
