# SPDX-License-Identifier: Apache-2.0
"""vLLM's TRITON_ATTN, wrapped."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from ems_vllm.engine.attention.wrap import wrap_backend

CompressedTritonAttentionBackend = wrap_backend(TritonAttentionBackend, __name__)
