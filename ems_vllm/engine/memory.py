# SPDX-License-Identifier: Apache-2.0
"""Memory that compression holds beside the KV cache, counted before the cache is sized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.policies.policy import Policy

_FLOAT32 = 4
# What one operator allocates on a GPU at most: kMaxScratchBytes of csrc/launchers.h.
KERNEL_SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Footprint:
    """What scores, query rings and the workspace take on one rank.

    Attributes:
        config: Settings of the server.
        policy: Made of them.
        max_model_len: Entries of the longest request.
        max_num_seqs: Rows of the query ring.
        query_itemsize: Bytes of one element of a query.
        num_heads: Query heads on this rank, by layer.
    """

    config: KVCompressionConfig
    policy: Policy
    max_model_len: int
    max_num_seqs: int
    query_itemsize: int
    num_heads: Mapping[str, int]

    def fixed_bytes(self, specs: Mapping[str, KVCacheSpec]) -> int:
        """Bytes that do not depend on the number of blocks."""
        total = self._workspace_bytes(specs) + KERNEL_SCRATCH_BYTES
        for name, spec in _compressed(specs).items():
            if self.config.scorer.uses_window:
                row = self.config.obs_window * self.num_heads[name] * spec.head_size
                total += self.max_num_seqs * row * self.query_itemsize
            total += (spec.num_prefix_score_pages or 0) * _score_page_bytes(spec)
        return total

    def _workspace_bytes(self, specs: Mapping[str, KVCacheSpec]) -> int:
        """What is set aside for a compaction: a layer of one request is never split."""
        layers = (
            self.policy.workspace_bytes(self.max_model_len, spec.num_kv_heads)
            for spec in _compressed(specs).values()
        )
        return max(self.config.workspace_mib << 20, *layers, 0)

    def reduce(self, available: int, specs: Mapping[str, KVCacheSpec]) -> int:
        """Bytes left for the KV cache of `available`, so that everything together fits.

        Every block id brings a page of scores in each layer that accumulates them, so the variable
        part is a fixed share of the cache. The groups of a hybrid model lie on top of each other:
        a block id has the bytes of one group, which holds at least as many layers as the rarest
        kind has.
        """
        kinds: dict[KVCacheSpec, int] = defaultdict(int)
        for spec in specs.values():
            kinds[spec] += spec.page_size_bytes
        pages = min(kinds.values())
        scores = sum(_score_page_bytes(spec) for spec in _compressed(specs).values())
        left = max(0, available - self.fixed_bytes(specs))
        return left * pages // (pages + scores)


def _compressed(specs: Mapping[str, KVCacheSpec]) -> dict[str, CompressedAttentionSpec]:
    return {name: spec for name, spec in specs.items() if isinstance(spec, CompressedAttentionSpec)}


def _score_page_bytes(spec: CompressedAttentionSpec) -> int:
    """Bytes of the scores of one block; 0 when the policy accumulates none."""
    if spec.num_prefix_score_pages is None:
        return 0
    return _FLOAT32 * spec.num_kv_heads * spec.block_size
