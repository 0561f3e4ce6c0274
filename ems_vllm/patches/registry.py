# SPDX-License-Identifier: Apache-2.0
"""Patches and contracts that are known in this process, for whoever needs them applied or checked.

The catalogue makes them known as the plugin loads it, which vLLM does in every process. Patches
call the engine and the engine applies patches; between them stands this file, which knows neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ems_vllm.patches.record import Patch, PatchError, Process

if TYPE_CHECKING:
    from ems_vllm.patches.contracts import Contract

_patches: list[Patch] = []
_contracts: list[Contract] = []


def make_known(patches: Iterable[Patch], contracts: Iterable[Contract]) -> None:
    """Take the place of what was known before."""
    _patches[:] = patches
    _contracts[:] = contracts


def apply(process: Process) -> None:
    """Apply what compression needs in a process of this kind, beyond what the plugin applies.

    Raises:
        PatchError: the first one that does not fit, those before it being in place; or nothing is
            known.
    """
    for patch in _known():
        if patch.process is process and not patch.always:
            patch.apply()


def verify() -> None:
    """Check all patches and contracts against the installed vLLM; nothing is changed.

    Raises:
        PatchError: the first one that does not fit; or nothing is known.
    """
    for error in problems():
        raise error


def problems() -> Iterator[PatchError]:
    """What `verify` raises the first of, one after the other."""
    try:
        checked: list[Patch | Contract] = [*_known(), *_contracts]
    except PatchError as error:
        yield error
        return
    for one in checked:
        try:
            one.verify()
        except PatchError as error:
            yield error


def count() -> tuple[int, int]:
    """How many patches and contracts are known."""
    return len(_patches), len(_contracts)


def _known() -> list[Patch]:
    if not _patches:
        raise PatchError(
            "ems-vllm was not loaded by vLLM in this process: allow its plugin ems_vllm in "
            "VLLM_PLUGINS."
        )
    return _patches
