# SPDX-License-Identifier: Apache-2.0
"""vLLM's FLASHINFER, wrapped."""

from vllm.v1.attention.backends.flashinfer import FlashInferBackend

from ems_vllm.engine.attention.wrap import wrap_backend

CompressedFlashInferBackend = wrap_backend(FlashInferBackend, __name__)
