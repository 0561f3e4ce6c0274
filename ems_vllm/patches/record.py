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
                none of those that were tested.
        """
        if self.is_applied():
            return
        self.verify()
        owner, name = self._resolve()
        raw = inspect.getattr_static(owner, name)
        original = _function(owner, name)
        wrapped = functools.wraps(original)(self.wrap(original))
        setattr(wrapped, _MARK, self.target)
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else (lambda fn: fn)
        setattr(owner, name, kind(wrapped))

    def is_applied(self) -> bool:
        return getattr(_function(*self._resolve()), _MARK, None) == self.target

    def verify(self) -> None:
        """Check that the patch fits the installed vLLM; nothing is changed.

        Raises:
            PatchError: as `apply`.
        """
        from vllm import __version__ as version

        base = version.split("+")[0]
        if base not in SpecifierSet(self.vllm):
            raise PatchError(
                f"vllm=={version} is not supported by this version of ems-vllm: {self.target} was "
                f"patched for vllm{self.vllm}; install one of those versions, or a newer ems-vllm."
            )
        owner, name = self._resolve()
        if self.is_applied() or not self.source_sha256:
            return
        # A release that was not tested is taken when it left this function as it was.
        if source_sha256(_function(owner, name)) not in self.source_sha256.values():
            raise PatchError(
                f"{self.target} of vllm=={version} is not the code that was tested: another "
                "extension may have patched it first; uninstall that one or disable it through "
                "VLLM_PLUGINS."
            )

    def current_sha256(self) -> str:
        """Hash of the target's source in the installed vLLM, patched or not."""
        return source_sha256(inspect.unwrap(_function(*self._resolve())))

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


def _function(owner: Any, name: str) -> Callable[..., Any]:
    """The plain function behind an attribute of a class, of whatever kind of method."""
    raw = inspect.getattr_static(owner, name)
    return raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw


def source_sha256(function: Callable[..., Any]) -> str:
    """Hash of a function's source text."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
