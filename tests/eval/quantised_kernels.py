# SPDX-License-Identifier: Apache-2.0
"""Run by test_quantised.py: what vLLM's kernels store, read back, beside ours."""

import math

import torch
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
from vllm.v1.attention.ops.int4_per_token_head import single_rht
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
    triton_reshape_and_cache_flash_per_token_head_quant,
)
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store
from vllm.v1.kv_cache_interface import get_kv_quant_mode

from ems_vllm.eval.transformers_engine.quantised import FORMATS, _hadamard

TOKENS, HEADS, SIZE = 6, 2, 64
SLOTS = torch.arange(TOKENS, dtype=torch.int32)


def per_token_head(name, dtype, width, keys, values):
    caches = [torch.zeros(1, 16, HEADS, width, dtype=dtype) for _ in range(2)]
    scales = [torch.zeros(1, 16, HEADS) for _ in range(2)]
    triton_reshape_and_cache_flash_per_token_head_quant(
        keys, values, *caches, *scales, SLOTS, get_kv_quant_mode(name)
    )
    for cache, scale in zip(caches, scales, strict=True):
        yield cache[0, :TOKENS], scale[0, :TOKENS, :, None]


def int8(keys, values):
    for numbers, scale in per_token_head("int8_per_token_head", torch.int8, SIZE, keys, values):
        yield numbers * scale


def int4(keys, values):
    name, width = "int4_per_token_head", SIZE // 2
    for packed, scale in per_token_head(name, torch.uint8, width, keys, values):
        levels = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float()
        bits = scale.view(torch.int32)
        read = (levels - (bits & 15)) * (bits & -16).view(torch.float32)
        yield single_rht(read, inverse=True) / SIZE


def unpacked(packed, bits):
    """Whole numbers of some bits, the lowest first."""
    single = ((packed.int()[..., None] >> torch.arange(8)) & 1).flatten(-2)
    return (single.unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


def turboquant(name, keys, values):
    settings = TurboQuantConfig.from_cache_dtype(name, SIZE)
    centroids = get_centroids(SIZE, settings.centroid_bits)
    rotation = _hadamard(SIZE, keys.device) / math.sqrt(SIZE)
    cache = torch.zeros(1, 16, HEADS, settings.slot_size_aligned, dtype=torch.uint8)
    triton_turboquant_store(
        keys, values, cache, SLOTS, rotation, (centroids[1:] + centroids[:-1]) / 2,
        settings.key_mse_bits, settings.key_packed_size, settings.effective_value_quant_bits,
    )  # fmt: skip
    end, bits = settings.key_packed_size, settings.value_quant_bits
    key_part, value_part = cache[0, :TOKENS, :, :end], cache[0, :TOKENS, :, end:]
    directions = centroids[unpacked(key_part[..., :-2], settings.key_mse_bits)]
    norms = key_part[..., -2:].contiguous().view(torch.float16).float()
    yield directions / directions.norm(dim=-1, keepdim=True) * norms @ rotation
    num_data = SIZE * bits // 8
    ends = value_part[..., num_data : num_data + 4].contiguous().view(torch.float16).float()
    yield unpacked(value_part[..., :num_data], bits) * ends[..., :1] + ends[..., 1:]


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, TOKENS, HEADS, SIZE, generator=generator)
    found = {"int8_per_token_head": int8(keys, values), "int4_per_token_head": int4(keys, values)}
    for name in ("turboquant_4bit_nc", "turboquant_3bit_nc"):
        found[name] = turboquant(name, keys, values)
    for name, (read_keys, read_values) in found.items():
        ours = FORMATS[name].stored(keys, values, 5, 30)
        torch.testing.assert_close(ours, (read_keys, read_values), rtol=1e-5, atol=1e-5)
        print("same")
