# SPDX-License-Identifier: Apache-2.0
"""All patches of vLLM: who applies which, and whether they fit the vLLM that is installed."""

from collections.abc import Iterable

from ems_vllm.patches.contracts import CONTRACTS, Contract
from ems_vllm.patches.frontend import (
    patch_async_llm,
    patch_engine_args,
    patch_input_processor,
    patch_online_renderer,
    patch_openai_serving,
)
from ems_vllm.patches.record import Patch, Process
from ems_vllm.patches.scheduler import patch_executor
from ems_vllm.patches.worker import patch_flash_attn

PATCHES: tuple[Patch, ...] = (
    *patch_engine_args.PATCHES,
    *patch_executor.PATCHES,
    *patch_input_processor.PATCHES,
    *patch_async_llm.PATCHES,
    *patch_openai_serving.PATCHES,
    *patch_online_renderer.PATCHES,
    *patch_flash_attn.PATCHES,
)

# The plugin applies these in every process: it is not told which one has loaded it.
ALWAYS = tuple(patch for patch in PATCHES if patch.always)


def apply(process: Process) -> None:
    """Apply what compression needs in a process of this kind, beyond `ALWAYS`.

    Raises:
        PatchError: the first one that does not fit; those before it are in place.
    """
    for patch in PATCHES:
        if patch.process is process and not patch.always:
            patch.apply()


def verify(records: Iterable[Patch | Contract] = (*PATCHES, *CONTRACTS)) -> None:
    """Check patches and contracts against the installed vLLM; nothing is changed.

    Raises:
        PatchError: the first one that does not fit.
    """
    for record in records:
        record.verify()
