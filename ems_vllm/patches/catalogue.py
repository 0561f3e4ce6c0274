# SPDX-License-Identifier: Apache-2.0
"""All patches of vLLM."""

from ems_vllm.patches import registry
from ems_vllm.patches.contracts import CONTRACTS
from ems_vllm.patches.frontend import (
    patch_async_llm,
    patch_engine_args,
    patch_input_processor,
    patch_online_renderer,
    patch_openai_serving,
    patch_output_processor,
    patch_stat_loggers,
)
from ems_vllm.patches.record import Patch
from ems_vllm.patches.scheduler import patch_executor
from ems_vllm.patches.worker import patch_flash_attn

PATCHES: tuple[Patch, ...] = (
    *patch_engine_args.PATCHES,
    *patch_executor.PATCHES,
    *patch_input_processor.PATCHES,
    *patch_async_llm.PATCHES,
    *patch_openai_serving.PATCHES,
    *patch_online_renderer.PATCHES,
    *patch_output_processor.PATCHES,
    *patch_stat_loggers.PATCHES,
    *patch_flash_attn.PATCHES,
)

# The plugin applies these in every process: it is not told which one has loaded it.
ALWAYS = tuple(patch for patch in PATCHES if patch.always)

registry.make_known(PATCHES, CONTRACTS)
