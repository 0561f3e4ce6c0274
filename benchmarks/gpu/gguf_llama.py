# SPDX-License-Identifier: Apache-2.0
"""Tensors of a Llama in GGUF: from their blocks to the weights that transformers names.

The values are those that transformers' own GGUF reader gives, bit by bit. Needs numpy and torch,
not the package gguf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NAMES_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Blocks:
    """Layout of a quantised type: 32 values a block, float16 scales first."""

    scale_bytes: int
    code_bytes: int


_KINDS = {"Q4_1": _Blocks(4, 16), "Q8_0": _Blocks(2, 32)}


def planes(kind: str, data: np.ndarray) -> list[np.ndarray]:
    """Take blocks apart into what resembles each other, so that each packs well by itself.

    Args:
        kind: ggml's type: Q4_1, Q8_0 or F32.
        data: Of a tensor, contiguous, of any dtype and shape.
    Returns:
        Of a quantised type one array for every byte of its scales, [num_blocks] uint8, then the
        codes, [num_blocks, bytes of codes] uint8. Of F32 one array, [4, num_values] uint8.
    Raises:
        ValueError: the type is another.
    """
    raw = np.ascontiguousarray(data).view(np.uint8)
    if kind == "F32":
        return [np.ascontiguousarray(raw.reshape(-1, 4).T)]
    if kind not in _KINDS:
        raise ValueError(f"tensors of type {kind} are not read")
    layout = _KINDS[kind]
    blocks = raw.reshape(-1, layout.scale_bytes + layout.code_bytes)
    scales, codes = np.split(blocks, [layout.scale_bytes], axis=1)
    return [*np.ascontiguousarray(scales.T), np.ascontiguousarray(codes)]


def values(kind: str, parts: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """What planes() took apart, as float32 of a shape."""
    if kind == "F32":
        found = np.ascontiguousarray(parts[0].reshape(4, -1).T).view(np.float32)
        return found.reshape(shape)
    *scale_bytes, codes = parts
    scales = np.stack(scale_bytes, axis=1).view(np.float16).astype(np.float32)
    if kind == "Q4_1":
        # The low halves of the 16 bytes come first.
        pairs = codes.reshape(-1, 16)
        nibbles = np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.float32)
        return (nibbles * scales[:, :1] + scales[:, 1:]).reshape(shape)
    return (codes.view(np.int8).reshape(-1, 32).astype(np.float32) * scales).reshape(shape)


def hf_name(name: str) -> str:
    """As transformers names a tensor of GGUF.

    Raises:
        KeyError: a Llama has no such tensor.
    """
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES_IN_LAYER[parts[2]]}.weight"
    return f"{_NAMES[parts[0]]}.weight"


def hf_weight(name: str, found: np.ndarray, config: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of GGUF as transformers keeps it, in bfloat16.

    Args:
        name: In GGUF.
        found: Its values, float32.
        config: Fields of LlamaConfig.
    """
    kind = name.split(".")[-2]
    if kind in ("attn_q", "attn_k"):
        key = "num_attention_heads" if kind == "attn_q" else "num_key_value_heads"
        found = _in_halves(found, config[key])
    return torch.from_numpy(np.ascontiguousarray(found)).to(torch.bfloat16)


def _in_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of rotary embeddings interleaved."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
