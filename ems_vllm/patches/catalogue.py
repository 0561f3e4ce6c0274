# SPDX-License-Identifier: Apache-2.0
"""All patches of vLLM, and whether they fit the one that is installed."""

from collections.abc import Iterable

from ems_vllm.patches import (
    async_llm,
    engine_args,
    executor,
    flash_attn,
    input_processor,
)
from ems_vllm.patches.record import Patch

# Applied wherever the package is installed; the others where compression is asked for.
ALWAYS: tuple[Patch, ...] = (*engine_args.PATCHES, *executor.PATCHES)

PATCHES: tuple[Patch, ...] = (
    *ALWAYS,
    *input_processor.PATCHES,
    *async_llm.PATCHES,
    *flash_attn.PATCHES,
)


def verify(patches: Iterable[Patch] = PATCHES) -> None:
    """Check patches against the installed vLLM; nothing is changed.

    Raises:
        PatchError: the first patch that does not fit.
    """
    for patch in patches:
        patch.verify()
