# SPDX-License-Identifier: Apache-2.0
"""Finds profiles of models: YAML files of `configs/profiles/`, or a file of the operator's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ems_vllm.config import recipes
from ems_vllm.config.errors import ConfigError, from_pydantic, shown
from ems_vllm.policies.model_profile import LayerProfile

# Components that read one.
_READERS = ("profile", "compresskv")


def _folder() -> Any:
    return resources.files("ems_vllm.configs") / "profiles"


def names() -> list[str]:
    """Names of the profiles that ship with the package: those of their models."""
    folder = _folder()
    # An installation has no folder where no profile ships.
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml")
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
    raise ConfigError(f"{key}={shown(profile)} is not a profile: give {_choices()}.")


def _choices() -> str:
    """What names a profile."""
    file = "the path of a .yaml file that `ems-vllm calibrate` wrote"
    return f"{', '.join(names())}, or {file}" if names() else file


def resolved(component: Any, key: str) -> Any:
    """A component's description with the content of the profile that it names.

    The settings travel to every process and node of an engine, which need not find the file.

    Args:
        component: As an operator wrote it; whatever takes no profile stays as it is.
        key: Of the component.

    Raises:
        ConfigError: there is no such profile, or it is none.
    """
    if not isinstance(component, dict) or component.get("name") not in _READERS:
        return component
    if component.get("profile") is None:
        raise ConfigError(f"{key}.profile is missing: give {_choices()}.")
    return {**component, "profile": _checked(component["profile"], f"{key}.profile")}


def _checked(profile: Any, key: str) -> LayerProfile:
    """The content of a profile; mistakes in a file are answered with its name."""
    source = f"{key}."
    if isinstance(profile, str):
        source = f"{key}={shown(profile)}: "
        profile = load(profile, key)
    if isinstance(profile, LayerProfile):
        return profile
    if not isinstance(profile, dict):
        raise ConfigError(f"{key}={shown(profile)} is not allowed: give {_choices()}.")
    try:
        return LayerProfile.model_validate(profile)
    except ValidationError as error:
        raise from_pydantic(error, source, LayerProfile.model_fields) from None
