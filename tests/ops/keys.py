# SPDX-License-Identifier: Apache-2.0
"""Caches of keys that RoPE turned, and the arguments that operators on them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from generators import PagedCache, int_tensor, paged_cache

LENS = [129, 63, 1, 0, 16]


@dataclass
class Case:
    """Arguments of key_moments and of key_scores.

    Attributes:
        keys: Those that both begin with: cache, table, lengths and rotation.
        moments: directions, means and products, of key_moments; poisoned.
        max_entries: Width of scores.
    """

    keys: tuple
    moments: tuple
    max_entries: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, rows and kv_heads."""
        cache, _, lens = self.keys[:3]
        return len(cache), len(lens), cache.shape[2]


def angles(num_positions: int, rotary_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_positions, rotary_dim], a slice of a wider table."""
    frequencies = 100.0 ** -torch.linspace(0, 1, rotary_dim // 2)
    turns = torch.outer(torch.arange(float(num_positions)), frequencies)
    table = torch.cat([turns.cos(), turns.sin(), torch.full_like(turns, torch.nan)], dim=1)
    return table.to(dtype)[:, :rotary_dim]


def make_case(
    lens: list[int] = LENS,
    *,
    rotary_dim: int | None = None,
    is_neox: bool = True,
    table_dtype: torch.dtype = torch.float32,
    num_positions: int | None = None,
    to_float8: bool = False,
    num_layers: int = 2,
    **shape: Any,
) -> Case:
    """A case whose keys lie around means of about their own length.

    Args:
        rotary_dim: None for the head size, 0 for no table.
        num_positions: Of the table; as many as there are entries by default.
    """
    cache: PagedCache = paged_cache(lens, num_layers=num_layers, **shape)
    if to_float8:
        cache = cache.to_float8()
    head_size = cache.key.shape[-1]
    rotary_dim = head_size if rotary_dim is None else rotary_dim
    positions = max([*lens, 1]) if num_positions is None else num_positions
    table = angles(positions, rotary_dim, table_dtype) if rotary_dim else None
    of_heads = (num_layers, len(lens), cache.key.shape[2])
    moments = tuple(
        torch.full((*of_heads, *size), torch.nan)
        for size in ((head_size,), (head_size,), (head_size, head_size))
    )
    keys = (cache.key, cache.block_table, int_tensor(lens), table, is_neox)
    return Case(keys, moments, max(lens) + 4)


# What a key is turned back by.
ROTATIONS = {
    "neox": {},
    "partly": {"rotary_dim": 20},
    "in pairs": {"is_neox": False},
    "partly in pairs": {"is_neox": False, "rotary_dim": 32},
    "without": {"rotary_dim": 0},
    "bfloat16 table": {"table_dtype": torch.bfloat16},
    "float16 table": {"table_dtype": torch.float16},
    "short table": {"num_positions": 50},
}
