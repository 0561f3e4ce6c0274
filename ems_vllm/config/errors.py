# SPDX-License-Identifier: Apache-2.0
"""Turns a validation failure into one sentence that names the key, the value and the remedy."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

_MAX_SHOWN = 200
# What is nested deeper, or has more items than can be shown, is not written out first.
_WRITER = reprlib.Repr()
_WRITER.maxlevel = 20
_WRITER.maxlist = _WRITER.maxtuple = _WRITER.maxdict = _MAX_SHOWN
# Of longer ones it shows the middle as dots, behind what is shown.
_WRITER.maxstring = _WRITER.maxlong = _WRITER.maxother = 4 * _MAX_SHOWN


class ConfigError(ValueError):
    """A setting of this package is wrong; the message is meant for the operator as it stands."""


class RequestError(ConfigError):
    """A request asks for what it may not have.

    Attributes:
        reason: One of few, for statistics: the key of `vllm_xargs` that is wrong,
            `misspelt` or `too_many_keys`.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def shown(value: Any) -> str:
    """A value as a message shows it, whatever a client has sent: not longer than is of use."""
    try:
        text = _WRITER.repr(value)
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def shown_key(key: Any) -> str:
    """A key as a message shows it; a file may have keys that are no strings, or hold anything."""
    text = key if isinstance(key, str) else shown(key)
    return text if len(text) <= _MAX_SHOWN and text.isprintable() else shown(text)


def unknown_key(prefix: str, key: Any, value: Any, allowed: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(key), allowed, n=1)
    remedy = f"use {near[0]!r}" if near else f"use one of {', '.join(allowed)}"
    if not allowed:
        remedy = "drop it"
    return ConfigError(f"{prefix}{shown_key(key)}={shown(value)} is not a setting: {remedy}.")


def from_pydantic(error: ValidationError, prefix: str, allowed: Iterable[str]) -> ConfigError:
    """The first failure of a pydantic validation as a ConfigError."""
    first = error.errors(include_url=False)[0]
    # pydantic says so where the key of a mapping is what is wrong.
    path = [shown_key(part) for part in first["loc"] if part != "[key]"]
    if first["type"] == "extra_forbidden":
        at = ".".join(path[:-1])
        inner = f"{prefix}{at}." if at else prefix
        return unknown_key(inner, first["loc"][-1], first["input"], allowed if not at else ())
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return ConfigError(f"{prefix.rstrip('.: ')}: {message}.")
    if first["type"] == "missing":
        return ConfigError(f"{prefix}{'.'.join(path)} is missing: give it.")
    value = shown(first["input"])
    return ConfigError(f"{prefix}{'.'.join(path)}={value} is not allowed: {_lower(message)}.")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
