# SPDX-License-Identifier: Apache-2.0
"""Views of the KV cache: keys and values of one layer, and of many layers as one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


def split_kv(kv_cache: torch.Tensor, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, as views of its cache.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] (keys and values side by
            side) or [num_blocks, 2 * num_kv_heads, block_size, head_size] (key heads first).

    Returns:
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_size]; float8_e4m3fn
            where vLLM keeps bytes.
    """
    if kv_cache.dtype == torch.uint8:
        # Other formats that vLLM keeps as bytes are refused at start-up.
        kv_cache = kv_cache.view(torch.float8_e4m3fn)
    if kv_cache.dim() == 4 and kv_cache.shape[1] == num_kv_heads and kv_cache.shape[3] % 2 == 0:
        key_cache, value_cache = kv_cache.chunk(2, dim=3)
    elif kv_cache.dim() == 4 and kv_cache.shape[1] == 2 * num_kv_heads:
        key_cache, value_cache = kv_cache.chunk(2, dim=1)
    else:
        raise ValueError(
            f"KV cache of shape {tuple(kv_cache.shape)} with {num_kv_heads} kv_heads is of no "
            "known layout; use another --attention-backend, or switch compression off."
        )
    return key_cache, value_cache


def as_pages(cache: torch.Tensor, dim: int) -> torch.Tensor:
    """The slots of one kv_head in one block as a block of their own, without copying.

    Args:
        cache: [..., num_blocks, num_kv_heads, block_size, ...] - the heads of a block follow each
            other at equal distances, and so do blocks, as in vLLM's layout LBHNC.
        dim: Index of the dimension of the blocks.

    Returns:
        [..., num_blocks * num_kv_heads, 1, block_size, ...].

    Raises:
        RuntimeError: they do not.
    """
    *before, num_blocks, num_kv_heads = cache.shape[: dim + 2]
    return cache.view(*before, num_blocks * num_kv_heads, 1, *cache.shape[dim + 2 :])


@dataclass(frozen=True)
class LayerStack:
    """Consecutive layers of a group whose caches lie at equal distances.

    Attributes:
        layers: Indices of the layers in their group.
        key_cache, value_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size].
    """

    layers: slice
    key_cache: torch.Tensor
    value_cache: torch.Tensor

    @property
    def num_layers(self) -> int:
        return self.key_cache.shape[0]

    def split(self, max_layers: int) -> Iterator[LayerStack]:
        """This stack in parts of at most `max_layers` layers."""
        for at in range(0, self.num_layers, max_layers):
            start = self.layers.start + at
            yield LayerStack(
                slice(start, min(start + max_layers, self.layers.stop)),
                self.key_cache[at : at + max_layers],
                self.value_cache[at : at + max_layers],
            )


def stack_layers(caches: Sequence[torch.Tensor], num_kv_heads: int) -> list[LayerStack]:
    """Describe the caches of a group with as few tensors as possible, without copying.

    vLLM lays the layers of a group out in one allocation, so that one stack is the rule.
    """
    stacks = []
    start = 0
    while start < len(caches):
        stop = _run_end(caches, start)
        distance = _distance(caches[start], caches[start + 1]) if stop - start > 1 else 0
        key_cache, value_cache = (
            half.as_strided(
                (stop - start, *half.shape), (distance, *half.stride()), half.storage_offset()
            )
            for half in split_kv(caches[start], num_kv_heads)
        )
        stacks.append(LayerStack(slice(start, stop), key_cache, value_cache))
        start = stop
    return stacks


def _run_end(caches: Sequence[torch.Tensor], start: int) -> int:
    """End of the longest run from `start` in which neighbours are the same distance apart."""
    stop = start + 1
    while stop < len(caches) and _is_alike(caches[start], caches[stop]):
        if stop - start > 1 and _distance(caches[stop - 1], caches[stop]) != _distance(
            caches[start], caches[start + 1]
        ):
            break
        if _distance(caches[stop - 1], caches[stop]) <= 0:
            break
        stop += 1
    return stop


def _is_alike(first: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        first.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and first.shape == other.shape
        and first.stride() == other.stride()
        and first.dtype == other.dtype
    )


def _distance(first: torch.Tensor, second: torch.Tensor) -> int:
    """Elements from one cache to the next in their common storage."""
    return int(second.storage_offset()) - int(first.storage_offset())
