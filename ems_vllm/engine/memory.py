# SPDX-License-Identifier: Apache-2.0
"""Memory that compression holds beside the KV cache, counted before the cache is sized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.score_store import score_bytes

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.policies.policy import Policy

# What one operator allocates on a GPU at most: kMaxScratchBytes of csrc/launchers.h.
KERNEL_SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Footprint:
    """What scores, query rings and the workspace take on one rank.

    Attributes:
        config: Settings of the server.
        policy: Made of them.
        max_model_len: Entries of the longest request.
        max_num_seqs: Most requests that run at a time.
        query_itemsize: Bytes of one element of a query.
        num_heads: Query heads on this rank, by layer.
        specs: KV-cache spec by layer.
    """

    config: KVCompressionConfig
    policy: Policy
    max_model_len: int
    max_num_seqs: int
    query_itemsize: int
    num_heads: Mapping[str, int]
    specs: Mapping[str, KVCacheSpec]

    @property
    def workspace_bytes(self) -> int:
        """What is set aside for a compaction: a layer of one request is never split."""
        layers = (
            self.policy.workspace_bytes(self.max_model_len, spec.num_kv_heads)
            for spec in self._compressed.values()
        )
        return max(self.config.workspace_mib << 20, *layers, 0) + KERNEL_SCRATCH_BYTES

    def score_bytes(self, num_blocks: int) -> int:
        """Of the score pages: one for every block, and the private ones."""
        return score_bytes(self._compressed.values(), num_blocks)

    def ring_bytes(self, num_blocks: int) -> int:
        """Of the query rings."""
        return sum(
            spec.num_ring_rows(num_blocks, self.max_num_seqs) * self._ring_row_bytes(name)
            for name, spec in self._compressed.items()
        )

    def total_bytes(self, num_blocks: int) -> int:
        """All of it, in a cache of `num_blocks` blocks."""
        return self.workspace_bytes + self.score_bytes(num_blocks) + self.ring_bytes(num_blocks)

    def reduce(self, available: int) -> int:
        """Bytes left for the KV cache of `available`, so that everything together fits.

        Scores and rings grow with the blocks. The groups of a hybrid model lie on top of each
        other: a block id has the bytes of one group, which holds at least as many layers as the
        rarest kind has.
        """
        kinds: dict[KVCacheSpec, int] = defaultdict(int)
        for spec in self.specs.values():
            kinds[spec] += spec.page_size_bytes
        page = min(kinds.values())
        most = max(0, available) // page
        fits = 0
        # total_bytes grows with every block, so halving finds the last number that fits.
        while fits < most:
            middle = (fits + most + 1) // 2
            if middle * page + self.total_bytes(middle) <= available:
                fits = middle
            else:
                most = middle - 1
        return fits * page

    @property
    def _compressed(self) -> dict[str, CompressedAttentionSpec]:
        return {
            name: spec
            for name, spec in self.specs.items()
            if isinstance(spec, CompressedAttentionSpec)
        }

    def _ring_row_bytes(self, name: str) -> int:
        head_size = self.specs[name].head_size
        return self.config.obs_window * self.num_heads[name] * head_size * self.query_itemsize
