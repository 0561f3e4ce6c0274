# SPDX-License-Identifier: Apache-2.0
"""The causal attention of one layer's prompt, which scoring is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from opbench.shapes import Shape


def candidates(shape: Shape) -> dict[str, Callable[[], object]]:
    """Every implementation at hand, by name."""
    model = shape.model
    tokens = (shape.num_rows * shape.length, model.num_heads, model.head_size)
    query = torch.randn(tokens, device=shape.device, dtype=shape.dtype)
    key, value = (
        torch.randn(
            tokens[0], model.num_kv_heads, model.head_size, device=shape.device, dtype=shape.dtype
        )
        for _ in range(2)
    )
    found: dict[str, Callable[[], object]] = {}
    backends = {"sdpa": None}
    if shape.device.type == "cuda":
        backends = {"sdpa_flash": SDPBackend.FLASH_ATTENTION}
        backends["sdpa_cudnn"] = SDPBackend.CUDNN_ATTENTION
        for version in (3, 2):
            call = _flash(shape, query, key, value, version)
            if call is not None:
                found[f"flash_attention_{version}"] = call
    heads = [
        tensor.unflatten(0, (shape.num_rows, shape.length)).transpose(1, 2)
        for tensor in (query, key, value)
    ]
    for name, backend in backends.items():
        call = _sdpa(heads, backend)
        if _works(call):
            found[name] = call
    return found


def _sdpa(heads: list[torch.Tensor], backend: SDPBackend | None) -> Callable[[], object]:
    query, key, value = heads

    def run() -> object:
        if backend is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return run


def _flash(
    shape: Shape, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, version: int
) -> Callable[[], object] | None:
    """vLLM's FlashAttention; None where there is none."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except Exception:
        return None
    starts = torch.arange(shape.num_rows + 1, device=shape.device, dtype=torch.int32) * shape.length

    def run() -> object:
        return flash_attn_varlen_func(
            query,
            key,
            value,
            max_seqlen_q=shape.length,
            cu_seqlens_q=starts,
            max_seqlen_k=shape.length,
            cu_seqlens_k=starts,
            softmax_scale=shape.scale,
            causal=True,
            fa_version=version,
        )

    return run if _works(run) else None


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:
        return False
    return True


def flops(shape: Shape) -> float:
    """Both products, over the pairs that the causal mask leaves."""
    pairs = shape.num_rows * shape.length * (shape.length + 1) / 2
    return 4.0 * pairs * shape.model.num_heads * shape.model.head_size
