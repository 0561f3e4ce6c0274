# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, one for each way of mixing attention kinds.

Their classes are vLLM's. Two parts of them need kernels that only an accelerator has, so
`stand_ins` computes those parts with PyTorch; attention, caches and scheduling stay vLLM's.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from engine.harness import LLAMA

SLIDING_WINDOW = 128
MAX_MODEL_LEN = 2048

_COMMON = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gemma2() -> Any:
    """Sliding-window and full layers in turn, attention logits soft-capped."""
    config = transformers.Gemma2Config(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=32,
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=None,
    )
    return transformers.Gemma2ForCausalLM(config)


def gemma3() -> Any:
    """Two sliding-window layers, then a full one, twice."""
    config = transformers.Gemma3TextConfig(
        **_COMMON,
        num_hidden_layers=6,
        head_dim=32,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
    )
    return transformers.Gemma3ForCausalLM(config)


def gemma3n() -> Any:
    """As Gemma 2 without the cap; the last two of six layers share the cache of earlier ones."""
    config = transformers.Gemma3nTextConfig(
        **_COMMON,
        num_hidden_layers=6,
        head_dim=32,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=2048,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=None,
    )
    return transformers.Gemma3nForCausalLM(config)


def gemma4() -> Any:
    """Sliding-window layers of head size 32, full ones of 64; two layers share a cache."""
    config = transformers.Gemma4TextConfig(
        **_COMMON,
        num_hidden_layers=6,
        head_dim=32,
        global_head_dim=64,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=2048,
        hidden_size_per_layer_input=16,
    )
    return transformers.Gemma4ForCausalLM(config)


def gpt_oss() -> Any:
    """Sliding-window and full layers in turn, each with attention sinks; one expert."""
    config = transformers.GptOssConfig(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=32,
        sliding_window=SLIDING_WINDOW,
        num_local_experts=1,
        num_experts_per_tok=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 2048,
        },
    )
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        # Large enough to take about half of the attention.
        torch.nn.init.normal_(layer.self_attn.sinks, mean=6.0)
    return model


def llama4() -> Any:
    """Chunked-local layers with RoPE and full ones without, in turn; no experts."""
    config = transformers.Llama4TextConfig(
        **_COMMON,
        intermediate_size_mlp=256,
        num_hidden_layers=4,
        head_dim=32,
        interleave_moe_layer_step=0,
        moe_layers=[],
        num_local_experts=1,
        no_rope_layers=[1, 0, 1, 0],
        attention_chunk_size=SLIDING_WINDOW,
    )
    return transformers.Llama4ForCausalLM(config)


def lfm2() -> Any:
    """Short convolutions, whose state vLLM keeps as for Mamba, and full layers in turn.

    The state is as large as 59 tokens of attention, so vLLM makes the blocks 64 tokens long.
    """
    config = transformers.Lfm2Config(
        **_COMMON,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        conv_L_cache=60,
        conv_dim=128,
        block_dim=128,
        block_ff_dim=256,
    )
    return transformers.Lfm2ForCausalLM(config)


def save(build: Callable[[], Any], folder: Path) -> str:
    """Write a model with a tokenizer for vLLM to load."""
    torch.manual_seed(0)
    model = build().float().eval()
    if model.config.model_type.startswith("gemma"):
        # Gemma's large embeddings would make a model of few layers repeat its last token.
        model.get_input_embeddings().weight.data *= 0.02
    for name, weight in model.named_parameters():
        if "k_norm" in name or "k_layernorm" in name:
            # Unit weights make all keys equally long, and selecting by length a matter of rounding.
            weight.data += 0.5 * torch.randn_like(weight)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{LLAMA}/{name}", folder)
    return str(folder)


@contextmanager
def stand_ins() -> Iterator[None]:
    """PyTorch in place of the kernels that these models need beyond attention."""
    from vllm.model_executor.layers.mamba import short_conv
    from vllm.model_executor.layers.mamba.ops.cpu import causal_conv1d
    from vllm.model_executor.models import gpt_oss as vllm_gpt_oss
    from vllm.v1.worker import mamba_utils

    convolution = short_conv.ShortConv
    with (
        mock.patch.object(vllm_gpt_oss.MLPBlock, "forward", _single_expert),
        mock.patch.object(convolution, "forward_cuda", convolution.forward_native),
        mock.patch.object(causal_conv1d, "causal_conv1d_update_cpu", _update_convolution),
        mock.patch.object(mamba_utils, "batch_memcpy", _copy_memory),
    ):
        yield


def _single_expert(block: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's MLP where there is one expert; x: [num_tokens, hidden_size]."""
    experts = block.experts.routed_experts
    gate_up = x @ experts.w13_weight[0].T + experts.w13_bias[0]
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    activated = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return activated @ experts.w2_weight[0].T + experts.w2_bias[0]


def _update_convolution(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """One step of a causal convolution.

    Args:
        x: [num_requests, dim].
        conv_state: [num_blocks, dim, width - 1]; written.
        weight: [dim, width].
        conv_state_indices: [num_requests].
    """
    assert bias is None
    assert activation is None
    window = torch.cat([conv_state[conv_state_indices], x[:, :, None]], dim=-1)
    conv_state[conv_state_indices] = window[..., 1:]
    return (window * weight).sum(-1)


def _copy_memory(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor) -> None:
    for source, target, size in zip(
        sources.tolist(), targets.tolist(), sizes.tolist(), strict=True
    ):
        ctypes.memmove(target, source, size)
