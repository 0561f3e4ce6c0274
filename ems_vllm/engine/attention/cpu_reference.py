# SPDX-License-Identifier: Apache-2.0
"""The CPU platform's backend, wrapped."""

from ems_vllm.engine.attention.wrap import wrap_backend
from ems_vllm.platform.attention import ReferenceAttentionBackend

CompressedReferenceAttentionBackend = wrap_backend(ReferenceAttentionBackend, __name__)
