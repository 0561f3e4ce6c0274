# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM by name, and whether they are still the code that was tested."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

# Whose decorators around a function of vLLM are vLLM's own.
_DECORATORS = ("vllm", "torch", "contextlib")

OUR_WRAPPERS: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
"""Wrappers that patches of this package have put around functions."""


class PatchError(RuntimeError):
    """vLLM is not what a patch was written for; nothing was changed."""


def installed_version() -> str:
    """The version of vLLM, without a local part such as +cu130."""
    from vllm import __version__

    return __version__.split("+")[0]


def fits(specifier: str) -> bool:
    """Whether the installed vLLM is one of the versions of `specifier`; an empty one is any."""
    if not specifier:
        return True
    try:
        # Said aloud: releases of packaging differ in what they make of pre-releases.
        return SpecifierSet(specifier).contains(installed_version(), prereleases=True)
    except InvalidVersion:
        # vLLM calls itself "dev" where it was built without its history.
        return False


def resolve(target: str) -> tuple[Any, str]:
    """The owner and the name of "module:Class.function".

    Raises:
        PatchError: vLLM has no such thing.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        raise PatchError(
            f"vllm=={installed_version()} has no {target}: install a vLLM version that ems-vllm "
            "supports, or a newer ems-vllm."
        ) from error
    return owner, name


def function_of(owner: Any, name: str) -> Callable[..., Any]:
    """The plain function behind an attribute of a class, of whatever kind of method."""
    raw = inspect.getattr_static(owner, name)
    if isinstance(raw, property) and raw.fget is not None:
        return raw.fget
    return raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw


def layers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function and what it wraps, as functools.wraps records it, from the outside in."""
    found: Callable[..., Any] | None = function
    while found is not None:
        yield found
        found = getattr(found, "__wrapped__", None)


def check_code(target: str, function: Callable[..., Any], tested: Mapping[str, str]) -> None:
    """Check that a function is as tested, and that nobody else has wrapped it.

    Args:
        target: How messages call it.
        function: The function as it is now.
        tested: Hash of its source per version of vLLM. A release that was not tested is taken when
            it left the function as it was.

    Raises:
        PatchError: with who has changed it, if that is known, and what to do.
    """
    *wrappers, original = layers(function)
    for wrapper in wrappers:
        if wrapper not in OUR_WRAPPERS and _origin(wrapper).partition(".")[0] not in _DECORATORS:
            raise PatchError(
                f"{target} of vllm=={installed_version()} has been wrapped by "
                f"{_origin(wrapper)}: uninstall that extension or disable it through VLLM_PLUGINS."
            )
    if source_sha256(target, original) not in tested.values():
        raise PatchError(
            f"{target} of vllm=={installed_version()} is not the code that was tested: another "
            "extension may have patched it first; uninstall that one or disable it through "
            "VLLM_PLUGINS."
        )


@functools.cache
def source_sha256(target: str, function: Callable[..., Any]) -> str:
    """Hash of a function's source text.

    Raises:
        PatchError: it is not written in Python, or vLLM is installed without its sources.
    """
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except TypeError:
        raise PatchError(
            f"{target} of vllm=={installed_version()} is not a Python function but "
            f"{type(function).__name__}: another extension has replaced it; uninstall that one or "
            "disable it through VLLM_PLUGINS."
        ) from None
    except OSError:
        raise PatchError(
            f"{target} of vllm=={installed_version()} cannot be compared with the code that was "
            "tested, because its source is missing: install vLLM with its .py files."
        ) from None


def _origin(function: Callable[..., Any]) -> str:
    """The module whose code runs when `function` is called; functools.wraps hides it."""
    if isinstance(function, FunctionType):
        return str(function.__globals__.get("__name__"))
    return type(function).__module__
