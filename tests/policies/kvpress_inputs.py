# SPDX-License-Identifier: Apache-2.0
"""Inputs on which kvpress' choices were recorded, and what it kept of them (kvpress.json)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

NUM_LAYERS = 2
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_SIZE = 16
HIDDEN = NUM_HEADS * HEAD_SIZE
NUM_TOKENS = 320
# Expected attention looks 512 positions ahead.
NUM_POSITIONS = NUM_TOKENS + 512 + 64
ROPE_THETA = 10000.0
WINDOW = 16
NUM_SINKS = 4
# Entries per kv_head that stay: 25 % and 50 %.
BUDGETS = (80, 160)

# With it, no choice changes where inputs do by 3e-5 of themselves.
_SEED = 40
_RECORDED = Path(__file__).with_name("kvpress.json")


@dataclass(frozen=True)
class Layer:
    """What one layer's attention sees of a prompt, in float32.

    Attributes:
        queries: [NUM_TOKENS, NUM_HEADS, HEAD_SIZE] - before RoPE.
        keys: [NUM_KV_HEADS, NUM_TOKENS, HEAD_SIZE] - after RoPE, neox style, positions from 0.
        values: [NUM_KV_HEADS, NUM_TOKENS, HEAD_SIZE]
        output_weight: [HIDDEN, HIDDEN] - of o_proj: its input has NUM_HEADS x HEAD_SIZE columns.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output_weight: torch.Tensor


def cos_sin() -> torch.Tensor:
    """[NUM_POSITIONS, HEAD_SIZE]: cosines of HEAD_SIZE / 2 angles, then sines, as vLLM has them."""
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0.0, HEAD_SIZE, 2) / HEAD_SIZE)
    angles = torch.outer(torch.arange(float(NUM_POSITIONS)), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layer(index: int) -> Layer:
    """The same on every machine and with every version of numpy.

    Queries of a head and keys of a kv_head have a direction in common, some keys are outliers,
    values differ in size, and later heads attend more sharply: methods are to disagree.
    The last kv_head of the last layer hardly looks beyond the window, so that AdaKV's safeguard
    has something to guard.
    """
    random = np.random.RandomState(_SEED + index)
    sharpness = np.linspace(0.5, 1.7, NUM_HEADS)[:, None]
    common = random.standard_normal((NUM_HEADS, HEAD_SIZE))
    queries = 1.2 * common + random.standard_normal((NUM_TOKENS, NUM_HEADS, HEAD_SIZE))
    keys = random.standard_normal((NUM_KV_HEADS, NUM_TOKENS, HEAD_SIZE))
    keys *= np.exp(0.2 * random.standard_normal((NUM_KV_HEADS, NUM_TOKENS, 1)))
    keys += 0.8 * random.standard_normal((NUM_KV_HEADS, 1, HEAD_SIZE))
    for of_head in keys:
        of_head[random.choice(NUM_TOKENS, 6, replace=False)] *= 2.5
    if index == NUM_LAYERS - 1:
        keys[-1, :-WINDOW] *= 0.5
        keys[-1, -WINDOW:] += 3.0 * common[-NUM_HEADS // NUM_KV_HEADS :].mean(0)
    values = random.standard_normal((NUM_KV_HEADS, NUM_TOKENS, HEAD_SIZE))
    values *= np.exp(0.7 * random.standard_normal((NUM_KV_HEADS, NUM_TOKENS, 1)))
    output_weight = random.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5
    # Columns are inputs: what a value is worth depends on where it points.
    output_weight *= np.exp(0.5 * random.standard_normal(HIDDEN))
    return Layer(
        queries=_float32(sharpness * queries),
        keys=_rotated(_float32(keys)),
        values=_float32(values),
        output_weight=_float32(output_weight),
    )


def kept(name: str, budget: int) -> torch.Tensor:
    """[NUM_LAYERS, NUM_KV_HEADS, NUM_TOKENS]: whether kvpress keeps an entry.

    Args:
        name: A method in kvpress.json.
        budget: One of BUDGETS.
    """
    masks = _recorded()["kept"][name][str(budget)]
    octets = np.array([[list(bytes.fromhex(mask)) for mask in of_layer] for of_layer in masks])
    return torch.from_numpy(np.unpackbits(octets.astype(np.uint8), axis=-1)).bool()


@cache
def _recorded() -> dict:
    return json.loads(_RECORDED.read_text())


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _rotated(keys: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin()[:NUM_TOKENS].chunk(2, dim=1)
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
