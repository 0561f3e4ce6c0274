# SPDX-License-Identifier: Apache-2.0
"""The attention backends of vLLM, each wrapped: same name, same kernels, other metadata.

`OVERRIDES` maps vLLM's backend names to the wrapped classes, which are imported when vLLM
selects one of them.
"""

from __future__ import annotations

OVERRIDES = {
    "FLASH_ATTN": "ems_vllm.engine.attention.flash_attn.CompressedFlashAttentionBackend",
    "FLASHINFER": "ems_vllm.engine.attention.flashinfer.CompressedFlashInferBackend",
    "TRITON_ATTN": "ems_vllm.engine.attention.triton_attn.CompressedTritonAttentionBackend",
    "FLEX_ATTENTION": "ems_vllm.engine.attention.flex_attention.CompressedFlexAttentionBackend",
    "TORCH_CPU": "ems_vllm.engine.attention.torch_cpu.CompressedTorchCPUBackend",
}


# vLLM's backends that send each batch to one of two others, by whether it holds image tokens that
# see each other. vLLM prefers them for models with such tokens on Hopper and later.
_COMPOSITES = ("TRITON_FLASH_ATTN", "TRITON_FLASHINFER")


def observable_backend(name: str) -> str:
    """What to choose instead of a backend that cannot be observed, in words.

    Args:
        name: vLLM's name of it.
    """
    if name in _COMPOSITES:
        # The one that batches with such tokens go to.
        return "TRITON_ATTN"
    return "one of them"


def override_backends() -> None:
    """Make vLLM use the wrapped backends in this process."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, class_path in OVERRIDES.items():
        if name in AttentionBackendEnum.__members__:
            register_backend(AttentionBackendEnum[name], class_path)
    selector._cached_get_attn_backend.cache_clear()


def restore_backends() -> None:
    """Undo `override_backends`, for a process that goes on with another engine."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for name in OVERRIDES:
        if name in AttentionBackendEnum.__members__:
            AttentionBackendEnum[name].clear_override()
    selector._cached_get_attn_backend.cache_clear()
