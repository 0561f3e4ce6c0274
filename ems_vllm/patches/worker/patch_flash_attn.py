# SPDX-License-Identifier: Apache-2.0
"""FlashAttention: hand over the softmax denominators that its kernels write anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backends.flash_attn import FA4DenseAttentionKernel


def _wrap_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(
        self: FA4DenseAttentionKernel,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        from ems_vllm.engine.attention import softmax_lse

        kept = softmax_lse.wanted()
        if kept is None:
            return original(self, q=q, k=k, v=v, **kwargs)
        out, kept.lse = original(self, q=q, k=k, v=v, return_softmax_lse=True, **kwargs)
        return out

    return __call__


PATCHES = (
    Patch(
        target="vllm.v1.attention.backends.flash_attn:FA4DenseAttentionKernel.__call__",
        wrap=_wrap_call,
        source_sha256=by_version(
            "1c19f8960fc10d537f83b81258c1d55e6bdb87bb76754a8d546f55eec603c613"
        ),
        process=Process.WORKER,
        reason=(
            "FlashAttentionImpl.forward drops the log of the softmax denominators, without which "
            "scoring a prompt has to compute every product of a query and a key twice."
        ),
        upstream="RFC #57566 (open): a contract for attention backends of other packages",
        remove_when="an attention implementation can be asked for its softmax LSE",
    ),
)
