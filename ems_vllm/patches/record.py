# SPDX-License-Identifier: Apache-2.0
"""A patch as data: what is wrapped, why, for which vLLM, and when it can go."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import FunctionType
from typing import Any

from ems_vllm.patches import target as targets
from ems_vllm.patches.target import OUR_WRAPPERS, PatchError
from ems_vllm.vllm_versions import SUPPORTED

__all__ = ["Patch", "PatchError", "Process"]

_MARK = "__ems_patch__"


class Process(StrEnum):
    """The process of vLLM in which a patched function runs.

    Attributes:
        FRONTEND: The API server, or the program that makes an `LLM`.
        SCHEDULER: The engine core, with the scheduler and the executor.
        WORKER: Every worker, with the model runner.
    """

    FRONTEND = "frontend"
    SCHEDULER = "scheduler"
    WORKER = "worker"


@dataclass(frozen=True)
class Patch:
    """Wraps one function of vLLM.

    Attributes:
        target: "module:Class.function".
        wrap: Takes the original function, returns the new one.
        source_sha256: Hash of the original's source per vLLM version it was tested with; empty:
            any source.
        process: Where the function runs, so who applies the patch.
        reason: What has no extension point.
        upstream: Issue or pull request of vLLM about it.
        remove_when: What vLLM would have to offer.
        vllm: Versions this was written for; empty: any.
        always: Whether it is applied where compression is off, too.
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    source_sha256: Mapping[str, str]
    process: Process
    reason: str
    upstream: str
    remove_when: str
    vllm: str = SUPPORTED
    always: bool = False

    def apply(self) -> None:
        """Apply the patch once; applying it again does nothing.

        Raises:
            PatchError: the vLLM version is outside `vllm`, the target is missing, its source is
                none of those that were tested, or somebody else has wrapped it.
        """
        if self.is_applied():
            return
        self.verify()
        owner, name = targets.resolve(self.target)
        raw = inspect.getattr_static(owner, name)
        if not isinstance(raw, FunctionType | staticmethod | classmethod):
            # Wrapped, it would be called with one argument more or less.
            raise PatchError(
                f"{self.target} of vllm=={targets.installed_version()} is not a function but "
                f"{type(raw).__name__}: another extension has replaced it; uninstall that one or "
                "disable it through VLLM_PLUGINS."
            )
        original = targets.function_of(owner, name)
        wrapped = functools.wraps(original)(self.wrap(original))
        setattr(wrapped, _MARK, self._mark)
        OUR_WRAPPERS.add(wrapped)
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else (lambda fn: fn)
        setattr(owner, name, kind(wrapped))

    def is_applied(self) -> bool:
        """Whether the patch is in place, alone or below wrappers of others.

        Raises:
            PatchError: vLLM has no such function.
        """
        found = targets.layers(targets.function_of(*targets.resolve(self.target)))
        return any(layer in OUR_WRAPPERS and getattr(layer, _MARK) == self._mark for layer in found)

    def verify(self) -> None:
        """Check that the patch fits the installed vLLM; nothing is changed.

        Raises:
            PatchError: as `apply`.
        """
        if not targets.fits(self.vllm):
            raise PatchError(
                f"vllm=={targets.installed_version()} is not supported by this version of "
                f"ems-vllm: {self.target} was patched for vllm{self.vllm}; install one of those "
                "versions, or a newer ems-vllm."
            )
        function = targets.function_of(*targets.resolve(self.target))
        if self.source_sha256:
            targets.check_code(self.target, function, self.source_sha256)

    def current_sha256(self) -> str:
        """Hash of the target's source in the installed vLLM, patched or not."""
        *_, original = targets.layers(targets.function_of(*targets.resolve(self.target)))
        return targets.source_sha256(self.target, original)

    @property
    def _mark(self) -> tuple[str, str]:
        # Two patches may be for one function; the reason tells them apart.
        return self.target, self.reason
