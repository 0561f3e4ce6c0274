# SPDX-License-Identifier: Apache-2.0
"""A patch as data: what is wrapped, why, for which vLLM, and when it can go."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

_MARK = "__ems_patch__"


class PatchError(RuntimeError):
    """vLLM is not what a patch was written for; nothing was changed."""


@dataclass(frozen=True)
class Patch:
    """Wraps one function of vLLM.

    Attributes:
        target: "module:Class.function".
        wrap: Takes the original function, returns the new one.
        vllm: Versions this was written for.
        source_sha256: Hash of the original's source per vLLM version it was tested with.
        reason: What has no extension point.
        remove_when: What vLLM would have to offer.
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    vllm: str
    source_sha256: Mapping[str, str]
    reason: str
    remove_when: str

    def apply(self) -> None:
        """Apply the patch once; applying it again does nothing.

        Raises:
            PatchError: the vLLM version is outside `vllm`, the target is missing, or its source is
                not the one that was tested.
        """
        from vllm import __version__ as version

        owner, name = self._resolve()
        raw = inspect.getattr_static(owner, name)
        original = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        if getattr(original, _MARK, None) == self.target:
            return
        self._check(version, original)
        wrapped = functools.wraps(original)(self.wrap(original))
        setattr(wrapped, _MARK, self.target)
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else (lambda fn: fn)
        setattr(owner, name, kind(wrapped))

    def is_applied(self) -> bool:
        owner, name = self._resolve()
        raw = inspect.getattr_static(owner, name)
        return getattr(getattr(raw, "__func__", raw), _MARK, None) == self.target

    def current_sha256(self) -> str:
        """Hash of the target's source in the installed vLLM, patched or not."""
        owner, name = self._resolve()
        raw = inspect.getattr_static(owner, name)
        return source_sha256(inspect.unwrap(getattr(raw, "__func__", raw)))

    def _resolve(self) -> tuple[Any, str]:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            raise PatchError(
                f"vLLM has no {self.target}: install a vLLM version in {self.vllm}."
            ) from error
        return owner, name

    def _check(self, version: str, original: Callable[..., Any]) -> None:
        base = version.split("+")[0]
        if base not in SpecifierSet(self.vllm):
            raise PatchError(
                f"vllm=={version} is not supported: {self.target} was patched for vllm{self.vllm}; "
                "install one of those versions, or a newer ems-vllm."
            )
        expected = self.source_sha256.get(base)
        if expected is not None and source_sha256(original) != expected:
            raise PatchError(
                f"{self.target} of vllm=={version} is not the code that was tested: another "
                "extension may have patched it first; uninstall that one or disable it through "
                "VLLM_PLUGINS."
            )


def source_sha256(function: Callable[..., Any]) -> str:
    """Hash of a function's source text."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
