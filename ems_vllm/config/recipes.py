# SPDX-License-Identifier: Apache-2.0
"""Finds recipes: the YAML files of `configs/policies/`, or a file of the operator's own."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ems_vllm.config.errors import ConfigError, shown

OFF = "off"


def _folder() -> Any:
    return resources.files("ems_vllm.configs") / "policies"


def names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _folder().iterdir()
        if entry.name.endswith(".yaml")
    )


def load(recipe: str) -> dict[str, Any]:
    """The settings of a recipe.

    Args:
        recipe: A shipped name, or the path of a YAML file.

    Raises:
        ConfigError: there is no such recipe, or the file does not hold a mapping.
    """
    if recipe in names():
        text = (_folder() / f"{recipe}.yaml").read_text(encoding="utf-8")
        return {"recipe": recipe, **_mapping(text, f"kv_compression={recipe!r}")}
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return {"recipe": path.stem, **read_file(path, "kv_compression")}
    raise ConfigError(
        f"kv_compression={shown(recipe)} is not a recipe: use {OFF}, {', '.join(names())}, "
        "or the path of a .yaml file."
    )


def described(recipe: str) -> tuple[str, str]:
    """Where a recipe that ships comes from, and what stays: its file begins "Name (...): what"."""
    lines = []
    for line in (_folder() / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("# ") or line.startswith("# Any setting"):
            break
        lines.append(line.removeprefix("# "))
    source, _, says = " ".join(lines).partition(": ")
    return source, says.rstrip(".")


def read_file(path: Path, key: str) -> dict[str, Any]:
    """The mapping in a YAML file; `key` names the setting that pointed to it."""
    source = f"{key}={shown(str(path))}"
    return _mapping(_read(path, source), source)


def read_list(path: Path, key: str) -> list[Any]:
    """The list in a YAML file; `key` names the setting that pointed to it."""
    source = f"{key}={shown(str(path))}"
    data = _parse(_read(path, source), source)
    if not isinstance(data, list):
        raise ConfigError(f"{source} holds a {type(data).__name__}: write a list.")
    return data


def _read(path: Path, source: str) -> str:
    """The text of a file; `source` begins the sentence about a mistake."""
    try:
        return path.read_text(encoding="utf-8")
    # ValueError: the path or the content is no text.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{source} cannot be read ({reason}): give the path of a YAML file."
        ) from None


def _parse(text: str, source: str) -> Any:
    """What a YAML text holds; `source` begins the sentence about a mistake."""
    try:
        return yaml.safe_load(text)
    # ValueError: what looks like a date or a number is none. RecursionError: nested too deep.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{source} is not valid YAML{line}: correct the file.") from None


def _mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping in a YAML text; `source` begins the sentence about a mistake."""
    data = _parse(text, source)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds a {type(data).__name__}: write a mapping of settings.")
    return data
