# SPDX-License-Identifier: Apache-2.0
"""The accumulated scores of all groups, in as few bytes as one group needs.

A block id belongs to one group at a time, as its bytes in the KV cache do. So the scores of groups
lie on top of each other, too; only the private pages of a group are its own (dealer.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

    Shape = tuple[int, int]


def shape(spec: CompressedAttentionSpec) -> Shape:
    """num_kv_heads and block_size: groups of the same share a tensor."""
    return spec.num_kv_heads, spec.block_size


class ScoreStore:
    """Scores of the compressed groups of a worker.

    Args:
        specs: Of all compressed groups, also those of which this worker has no layer.
        num_layers: Of each group on this worker.
        num_blocks: Blocks of the cache.
        device: Of the cache.
        pool: Where they are allocated.
    """

    def __init__(
        self,
        specs: Sequence[CompressedAttentionSpec],
        num_layers: Sequence[int],
        num_blocks: int,
        device: torch.device,
        pool: AbstractContextManager[Any],
    ) -> None:
        num_pages = num_blocks + sum(spec.num_score_pages for spec in specs)
        most: dict[Shape, int] = defaultdict(int)
        for spec, count in zip(specs, num_layers, strict=True):
            most[shape(spec)] = max(most[shape(spec)], count)
        with pool:
            self._scores = {
                (num_kv_heads, block_size): torch.zeros(
                    (count, num_pages, num_kv_heads, block_size),
                    dtype=torch.float32,
                    device=device,
                )
                for (num_kv_heads, block_size), count in most.items()
            }

    def of(self, spec: CompressedAttentionSpec, num_layers: int) -> torch.Tensor:
        """[num_layers, num_pages, num_kv_heads, block_size], float32 - of a group, by page."""
        return self._scores[shape(spec)][:num_layers]


def score_bytes(specs: Iterable[CompressedAttentionSpec], num_blocks: int) -> int:
    """Bytes of a ScoreStore, at most, before vLLM has made groups of the layers.

    Args:
        specs: Of every compressed layer. Layers of one spec make one group, or several of fewer.
        num_blocks: Blocks of the cache.
    """
    kinds = Counter(specs)
    num_pages = num_blocks + sum(spec.num_score_pages for spec in kinds)
    most: dict[Shape, int] = defaultdict(int)
    for spec, count in kinds.items():
        most[shape(spec)] = max(most[shape(spec)], count * spec.score_page_bytes)
    return num_pages * sum(most.values())
