# SPDX-License-Identifier: Apache-2.0
"""vLLM's FLASH_ATTN, wrapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from ems_vllm.engine.attention import softmax_lse
from ems_vllm.engine.attention.wrap import wrap_backend
from ems_vllm.patches import registry
from ems_vllm.patches.record import Process

if TYPE_CHECKING:
    import torch

# FlashAttention 2 and 3 write the LSE of every call; 4 compiles another kernel for it.
_VERSIONS_WITH_LSE = (2, 3)

registry.apply(Process.WORKER)


class LseFlashAttentionImpl(FlashAttentionImpl):
    """FlashAttention that keeps its softmax LSE when asked to.

    Attributes:
        keep_softmax_lse: Whether `forward` keeps the log of its softmax denominators.
        softmax_lse: [num_tokens, num_heads], float32 - what it kept; None where the kernel has none
            or counts attention sinks in.
    """

    keep_softmax_lse = False
    softmax_lse: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.softmax_lse = None
        version = self.vllm_flash_attn_version
        if not self.keep_softmax_lse or self.sinks is not None or version not in _VERSIONS_WITH_LSE:
            return super().forward(*args, **kwargs)
        with softmax_lse.keeping() as kept:
            result = super().forward(*args, **kwargs)
        if kept.lse is not None:
            self.softmax_lse = kept.lse.t()
        return result


CompressedFlashAttentionBackend = wrap_backend(
    FlashAttentionBackend, __name__, LseFlashAttentionImpl
)
