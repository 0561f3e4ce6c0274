# SPDX-License-Identifier: Apache-2.0
"""Finds layer profiles: the YAML files of `configs/profiles/`, or a file of the operator's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from ems_vllm.config import recipes
from ems_vllm.config.errors import ConfigError, shown


def _folder() -> Any:
    return resources.files("ems_vllm.configs") / "profiles"


def names() -> list[str]:
    """Names of the profiles that ship with the package: those of their models."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _folder().iterdir()
        if entry.name.endswith(".yaml")
    )


def load(profile: str, key: str) -> dict[str, Any]:
    """A profile as its file holds it.

    Args:
        profile: A shipped name, or the path of a YAML file.
        key: The setting that names it.

    Raises:
        ConfigError: there is no such profile, or the file does not hold a mapping.
    """
    if profile in names():
        with resources.as_file(_folder() / f"{profile}.yaml") as path:
            return recipes.read_file(path, key)
    if Path(profile).suffix in (".yaml", ".yml"):
        return recipes.read_file(Path(profile), key)
    raise ConfigError(
        f"{key}={shown(profile)} is not a profile: use {', '.join(names())}, or the path of a "
        ".yaml file that `ems-vllm profile` wrote."
    )


def resolved(component: Any, key: str) -> Any:
    """A component's description with the content of the profile that it names.

    The settings travel to every process and node of an engine, which need not find the file.

    Args:
        component: As an operator wrote it; whatever names no profile stays as it is.
        key: Of the component.
    """
    if not isinstance(component, dict) or not isinstance(component.get("profile"), str):
        return component
    return {**component, "profile": load(component["profile"], f"{key}.profile")}
