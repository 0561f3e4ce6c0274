# SPDX-License-Identifier: Apache-2.0
"""All patches of vLLM, and whether they fit the one that is installed."""

from collections.abc import Iterable

from ems_vllm.patches import (
    async_llm,
    engine_args,
    executor,
    flash_attn,
    input_processor,
    online_renderer,
    openai_serving,
)
from ems_vllm.patches.contracts import CONTRACTS, Contract
from ems_vllm.patches.record import Patch

# Applied wherever the package is installed; the others where compression is asked for.
ALWAYS: tuple[Patch, ...] = (*engine_args.PATCHES, *executor.PATCHES)

PATCHES: tuple[Patch, ...] = (
    *ALWAYS,
    *input_processor.PATCHES,
    *async_llm.PATCHES,
    *openai_serving.PATCHES,
    *online_renderer.PATCHES,
    *flash_attn.PATCHES,
)


def verify(records: Iterable[Patch | Contract] = (*PATCHES, *CONTRACTS)) -> None:
    """Check patches and contracts against the installed vLLM; nothing is changed.

    Raises:
        PatchError: the first one that does not fit.
    """
    for record in records:
        record.verify()
