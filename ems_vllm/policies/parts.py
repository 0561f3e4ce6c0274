# SPDX-License-Identifier: Apache-2.0
"""Keys or values of entries, as many at a time as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Part:
    """Keys or values of some layers and rows.

    Iterating yields entries, which begin and end with blocks, and their vectors: [layers, rows,
    num_kv_heads, entries, head_size], float32; anything where a row has no such entry. Where there
    is room for all at once, they are there until the part is dropped, and iterating again makes
    none.

    Args:
        layers, rows: Of the context.
        entries: What is made at a time.
        vectors_of: Makes the vectors of entries.
    """

    def __init__(
        self,
        layers: slice,
        rows: slice,
        entries: Sequence[slice],
        vectors_of: Callable[[slice], Tensor],
    ) -> None:
        self.layers = layers
        self.rows = rows
        self._entries = entries
        self._vectors_of = vectors_of
        self._all: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers and of rows."""
        return self.layers.stop - self.layers.start, self.rows.stop - self.rows.start

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for entries in self._entries:
            vectors = self._vectors_of(entries) if self._all is None else self._all
            if len(self._entries) == 1:
                self._all = vectors
            yield entries, vectors

    def made_into(self, change: Callable[[slice, Tensor], Tensor]) -> Part:
        """This part with other vectors.

        Args:
            change: What to make of entries' vectors, which may be overwritten.
        """
        vectors_of = self._vectors_of
        return Part(
            self.layers,
            self.rows,
            self._entries,
            lambda entries: change(entries, vectors_of(entries)),
        )


def gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Vectors of blocks, one after the other for each kv_head.

    Args:
        cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], any strides.
        blocks: [num_rows, num_columns], int32.

    Returns:
        [num_layers, num_rows, num_kv_heads, num_columns * block_size, head_size], float32,
        contiguous.
    """
    # Bytes of a float8, because hardly any function knows it.
    is_float8 = cache.dtype == torch.float8_e4m3fn
    stored = cache.view(torch.uint8) if is_float8 else cache
    found = stored.new_empty((len(cache), blocks.numel(), *cache.shape[2:]))
    if cache.is_cuda:
        torch.index_select(stored, 1, blocks.flatten(), out=found)
    else:
        # An index copies numbers, this copies blocks; and where blocks are not the first dimension,
        # the whole cache.
        for layer, of_layer in zip(stored, found, strict=True):
            torch.index_select(layer, 0, blocks.flatten(), out=of_layer)
    found = found.view(cache.dtype).unflatten(1, blocks.shape).transpose(2, 3)
    return found.to(torch.float32, memory_format=torch.contiguous_format).flatten(3, 4)
