# SPDX-License-Identifier: Apache-2.0
"""Shapes that operators are timed at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_SIZE = 16
OBS_WINDOW = 32
# Tokens of a cache of all layers that fit a GPU beside everything else.
MAX_TOKENS = 1 << 18


@dataclass(frozen=True)
class Model:
    """What a model's attention looks like.

    Attributes:
        num_layers: Layers that one call of an operator handles, where it takes several.
        weight_bytes: Of the whole model; a decode step reads them all.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    weight_bytes: int = 0


LLAMA_8B = Model("Llama-3.1-8B", 32, 32, 8, 128, weight_bytes=2 * 8_030_261_248)
CPU_MODELS = (
    Model("small", 4, 8, 4, 64),
    Model("Qwen3-0.6B", 4, 16, 8, 128),
    Model("Llama-3.1-8B/tp4", 4, 8, 2, 128),
)
MODELS = {model.name: model for model in (LLAMA_8B, *CPU_MODELS)}


@dataclass(frozen=True)
class Shape:
    """One set of arguments.

    Attributes:
        length: Tokens of each request.
        num_rows: Requests.
        budget: Entries kept per kv_head; as many are merged into them.
    """

    model: Model
    length: int
    num_rows: int
    budget: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_columns(self) -> int:
        return -(-self.length // BLOCK_SIZE)

    @property
    def group(self) -> int:
        return self.model.num_heads // self.model.num_kv_heads

    @property
    def scale(self) -> float:
        return self.model.head_size**-0.5

    @property
    def element_bytes(self) -> int:
        return torch.finfo(self.dtype).bits // 8

    @property
    def num_heads_in_all(self) -> int:
        """(layer, request, kv_head) triples."""
        return self.model.num_layers * self.num_rows * self.model.num_kv_heads
