# SPDX-License-Identifier: Apache-2.0
"""vLLM's FLEX_ATTENTION, wrapped."""

from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

from ems_vllm.engine.attention.wrap import wrap_backend

CompressedFlexAttentionBackend = wrap_backend(FlexAttentionBackend, __name__)
