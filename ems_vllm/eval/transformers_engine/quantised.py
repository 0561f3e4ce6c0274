# SPDX-License-Identifier: Apache-2.0
"""What vLLM's quantised KV caches make of keys and values: stored, and read again.

Names are those of --kv-cache-dtype. The formats are defined by vLLM 0.32's sources, named below;
here they are written a second time, in plain PyTorch. Numbers are read back in the model's dtype.
Queries, probabilities and sums keep the model's precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from ems_vllm.config.errors import ConfigError, shown

if TYPE_CHECKING:
    from ems_vllm.config.cache_shape import CacheShape

_FLOAT8 = torch.float8_e4m3fn
_SCALE_BYTES = 4
_HALF_BYTES = 2
# vLLM's seed of the signs: v1/attention/ops/int4_per_token_head.py, _get_rht_signs.
_SIGN_SEED = 0x9E3779B9
# See _centroids.
_LLOYD_STEPS, _LLOYD_TRAPEZOIDS, _LLOYD_TOLERANCE, _LLOYD_END = 200, 200, 1e-10, 3.5


@dataclass(frozen=True)
class Vectors:
    """How keys, or values, are stored.

    Attributes:
        round_trip: Vectors [..., head_size], float, to what is read back; same shape and dtype.
        num_bytes: Of a stored vector, its scales included, by head_size.
    """

    round_trip: Callable[[torch.Tensor], torch.Tensor]
    num_bytes: Callable[[int], int]


@dataclass(frozen=True)
class CacheFormat:
    """How a cache is stored.

    Attributes:
        name: In vLLM.
        keys, values: Vectors of a kv_head; None leaves them in the model's dtype.
        prefill: Name of the format in which a prompt's own queries see the prompt: vLLM attends to
            what is stored, but with TurboQuant, which has the prompt's first chunk at hand.
        num_plain_layers: First and as many last layers that stay in the model's dtype.
        unit: head_size must be a multiple of it, or a power of two where it is None.
    """

    name: str
    keys: Vectors | None
    values: Vectors | None
    prefill: str
    num_plain_layers: int = 0
    unit: int | None = 1

    def check(self, head_size: int) -> None:
        """Raise ConfigError where vectors of this size cannot be stored."""
        if head_size & (head_size - 1) if self.unit is None else head_size % self.unit:
            raise ConfigError(
                f"kv_cache_dtype={shown(self.name)} stores no heads of {head_size} numbers: use "
                "fp8 or int8_per_token_head."
            )

    def stored(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, num_layers: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read of keys and values that a layer stores.

        Args:
            keys, values: [..., head_size], in the model's dtype; not changed.
            layer: 0..num_layers-1.
            num_layers: Layers with a cache.
        """
        if self.keys is None or self.values is None or self._is_plain(layer, num_layers):
            return keys, values
        return self.keys.round_trip(keys), self.values.round_trip(values)

    def entry_bytes(self, shape: CacheShape) -> float:
        """Bytes of a key and a value of one kv_head, scales included, mean over layers.

        Where layers differ, vLLM may pad the smaller pages; that is not counted.
        """
        plain = 2 * shape.head_size * shape.itemsize
        if self.keys is None or self.values is None:
            return plain
        packed = self.keys.num_bytes(shape.head_size) + self.values.num_bytes(shape.head_size)
        # vLLM makes it even.
        packed += packed % 2
        layers = range(shape.num_layers)
        num_plain = sum(self._is_plain(layer, shape.num_layers) for layer in layers)
        return (num_plain * plain + (shape.num_layers - num_plain) * packed) / shape.num_layers

    def _is_plain(self, layer: int, num_layers: int) -> bool:
        num_plain = min(self.num_plain_layers, num_layers // 2)
        return layer < num_plain or layer >= num_layers - num_plain


def cache_format(name: str) -> CacheFormat:
    """A format by vLLM's name.

    Raises:
        ConfigError: it is not among those that are known here.
    """
    if name not in FORMATS:
        raise ConfigError(
            f"kv_cache_dtype={shown(name)} is not known here: use {', '.join(FORMATS)}."
        )
    return FORMATS[name]


def _float8(x: torch.Tensor) -> torch.Tensor:
    """e4m3 with scale 1, as ems_vllm.cpu_platform.attention writes it; too large is saturated."""
    return _to_float8(x.float()).to(x.dtype)


def _to_float8(x: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(_FLOAT8).max
    return x.clamp(-largest, largest).to(_FLOAT8).float()


def _per_vector(x: torch.Tensor, largest: float, is_integer: bool) -> torch.Tensor:
    """One float32 scale for a vector: v1/attention/ops/triton_reshape_and_cache_flash.py."""
    scale = (x.float().abs().amax(-1, keepdim=True) / largest).clamp_min(1e-6)
    scaled = x.float() * (1 / scale)
    levels = _half_away(scaled).clamp(-largest - 1, largest) if is_integer else _to_float8(scaled)
    return (levels * scale).to(x.dtype)


def _int8_per_vector(x: torch.Tensor) -> torch.Tensor:
    return _per_vector(x, 127, is_integer=True)


def _float8_per_vector(x: torch.Tensor) -> torch.Tensor:
    return _per_vector(x, torch.finfo(_FLOAT8).max, is_integer=False)


def _int4_per_vector(x: torch.Tensor) -> torch.Tensor:
    """Rotated, 16 levels between its ends: v1/attention/ops/int4_per_token_head.py.

    The zero point takes the place of the scale's four lowest bits.
    """
    head_size = x.shape[-1]
    size = head_size & -head_size
    signs = _signs(size, x.device)
    rows = x.float().unflatten(-1, (-1, size))
    rotated = ((rows * signs) @ _hadamard(size, x.device)).flatten(-2).to(x.dtype).float()
    lowest, highest = rotated.aminmax(dim=-1, keepdim=True)
    scale = ((highest - lowest) / 15).clamp_min(1e-6)
    zero = _half_away(-lowest / scale).clamp(0, 15)
    levels = _half_away(rotated * (1 / scale) + zero).clamp(0, 15)
    read_scale = (scale.view(torch.int32) & -16).view(torch.float32)
    read = ((levels - zero) * read_scale).unflatten(-1, (-1, size))
    return ((read @ _hadamard(size, x.device)) * signs / size).flatten(-2).to(x.dtype)


def _turboquant_keys(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A rotated direction in centroids, and a float16 norm.

    v1/attention/ops/triton_turboquant_store.py and triton_turboquant_decode.py: what is read is
    made as long as the norm says (the presets' "nc").
    """
    norm = x.float().norm(dim=-1, keepdim=True)
    rotation = _hadamard(x.shape[-1], x.device) / math.sqrt(x.shape[-1])
    rotated = (x.float() / (norm + 1e-8)) @ rotation
    centroids = _centroids(x.shape[-1], bits).to(x.device)
    read = centroids[torch.bucketize(rotated, (centroids[1:] + centroids[:-1]) / 2, right=True)]
    read = read * (read.square().sum(-1, keepdim=True) + 1e-16).rsqrt()
    return ((read * norm.half().float()) @ rotation).to(x.dtype)


def _turboquant_values(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels between a vector's ends, with a float16 scale and lowest value; the same sources."""
    lowest, highest = x.float().aminmax(dim=-1, keepdim=True)
    scale = ((highest - lowest) / (2**bits - 1)).clamp_min(1e-8)
    levels = ((x.float() - lowest) / scale + 0.5).trunc().clamp(0, 2**bits - 1)
    return (levels * scale.half().float() + lowest.half().float()).to(x.dtype)


def _half_away(x: torch.Tensor) -> torch.Tensor:
    """To whole numbers, halves away from zero."""
    return (x + torch.where(x >= 0, 0.5, -0.5)).trunc()


@cache
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """[size, size], float32, +-1: Sylvester's construction; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.to(device)


@cache
def _signs(size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    return (2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1).to(device)


@cache
def _centroids(size: int, bits: int) -> torch.Tensor:
    """[2 ** bits], float32, ascending: Lloyd's iteration for normal numbers of variance 1 / size.

    What is stored depends on every digit, so start, steps and integration (trapezoids) are those of
    model_executor/layers/quantization/turboquant/centroids.py.
    """
    num_levels = 2**bits
    # In units of the deviation.
    end = torch.tensor([_LLOYD_END], dtype=torch.float64)
    centroids = (2 * torch.arange(num_levels) + 1 - num_levels) * end / num_levels
    places = torch.linspace(0, 1, _LLOYD_TRAPEZOIDS + 1, dtype=torch.float64)
    for _ in range(_LLOYD_STEPS):
        edges = torch.cat([-3 * end, (centroids[1:] + centroids[:-1]) / 2, 3 * end])
        numbers = edges[:-1, None] + edges.diff()[:, None] * places
        density = (-numbers.square() / 2).exp()
        means = torch.trapezoid(density * numbers) / torch.trapezoid(density)
        moved = float((means - centroids).abs().max()) / math.sqrt(size)
        if moved < _LLOYD_TOLERANCE:
            break
        centroids = means
    return (centroids / math.sqrt(size)).float()


def _turboquant(name: str, key_bits: int, value_bits: int) -> CacheFormat:
    """A preset of model_executor/layers/quantization/turboquant/config.py; 8 bits are e4m3.

    vLLM leaves the first two and last two layers of a model in its dtype.
    """
    keys = Vectors(
        lambda x: _turboquant_keys(x, key_bits),
        lambda size: -(-size * key_bits // 8) + _HALF_BYTES,
    )
    if key_bits == 8:
        keys = FLOAT8
    values = Vectors(
        lambda x: _turboquant_values(x, value_bits),
        lambda size: -(-size * value_bits // 8) + 2 * _HALF_BYTES,
    )
    return CacheFormat(name, keys, values, PLAIN, num_plain_layers=2, unit=None)


def _both(name: str, vectors: Vectors | None, unit: int = 1) -> CacheFormat:
    return CacheFormat(name, vectors, vectors, name, unit=unit)


PLAIN = "auto"
FLOAT8 = Vectors(_float8, lambda size: size)
FORMATS = {
    one.name: one
    for one in (
        _both(PLAIN, None),
        _both("fp8", FLOAT8),
        _both("fp8_per_token_head", Vectors(_float8_per_vector, lambda n: n + _SCALE_BYTES)),
        _both("int8_per_token_head", Vectors(_int8_per_vector, lambda n: n + _SCALE_BYTES)),
        _both("int4_per_token_head", Vectors(_int4_per_vector, lambda n: n // 2 + _SCALE_BYTES), 2),
        _turboquant("turboquant_k8v4", 8, 4),
        _turboquant("turboquant_4bit_nc", 4, 4),
        _turboquant("turboquant_k3v4_nc", 3, 4),
        _turboquant("turboquant_3bit_nc", 3, 3),
    )
}
"""Formats by name; "auto" is the model's own dtype."""
