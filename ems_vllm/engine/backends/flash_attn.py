# SPDX-License-Identifier: Apache-2.0
"""vLLM's FLASH_ATTN, wrapped."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from ems_vllm.engine.backends.wrap import wrap_backend

CompressedFlashAttentionBackend = wrap_backend(FlashAttentionBackend, __name__)
