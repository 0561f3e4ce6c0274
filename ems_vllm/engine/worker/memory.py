# SPDX-License-Identifier: Apache-2.0
"""Memory that compression holds beside the KV cache, counted before the cache is sized."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.engine.attention.head_batch import batch_bytes
from ems_vllm.engine.group.divergence import reference_bytes
from ems_vllm.engine.group.head_tables import page_start_bytes
from ems_vllm.engine.group.query_ring import QueryRing
from ems_vllm.engine.group.score_store import score_bytes
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.policies.context import SLICE_BYTES

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.policies.policy import Policy

# What one operator allocates on a GPU at most: kMaxScratchBytes of csrc/launchers.h.
KERNEL_SCRATCH_BYTES = 32 << 20
# Members that merge_compact sorts in shared memory: kMaxSharedMembers of its kernel.
_MAX_SHARED_MEMBERS = 4096


def merge_scratch_bytes(
    num_rows: int, max_budget: int, max_merges: int, head_size: int, itemsize: int
) -> int:
    """Bound of what `ops.merge_compact` allocates on a GPU, whatever the number of groups.

    Ours: a group of rows that share blocks is staged as a whole, so it may take more than
    KERNEL_SCRATCH_BYTES. By row: the merged keys and values and their scores, the members of
    classes and where each class begins, and what sorting takes where shared memory is too small.

    Args:
        num_rows: Rows of a group, `rows_together`, of one kv_head each; times `num_kv_heads` where
            rows have several.
        max_budget, max_merges: Lengths of kept_idx and merge_idx.
        head_size: Elements of a key.
        itemsize: Bytes of an element of the cache.
    """
    sort_length = 1 << max(0, max_merges - 1).bit_length()
    parts = (
        max_budget * 2 * head_size * itemsize,
        max_budget * 4,
        max_merges * 4,
        (max_budget + 1) * 4,
        sort_length * 8 if sort_length > _MAX_SHARED_MEMBERS else 0,
    )
    # Each begins at a multiple of 16 bytes.
    return max(KERNEL_SCRATCH_BYTES, num_rows * sum(-(-part // 16) * 16 for part in parts))


@dataclass(frozen=True)
class Footprint:
    """What scores, query rings, tables of kv_heads and the workspace take on one rank.

    Attributes:
        config: Settings of the server.
        policy: Made of them.
        max_model_len: Entries of the longest request.
        max_num_seqs: Most requests that run at a time.
        max_num_reqs: Rows of the largest batch, CUDA-graph padding included.
        query_itemsize: Bytes of one element of a query.
        num_heads: Query heads on this rank, by layer.
        specs: KV-cache spec by layer.
    """

    config: KVCompressionConfig
    policy: Policy
    max_model_len: int
    max_num_seqs: int
    max_num_reqs: int
    query_itemsize: int
    num_heads: Mapping[str, int]
    specs: Mapping[str, KVCacheSpec]

    @property
    def workspace_bytes(self) -> int:
        """What is set aside for a compaction: a layer of one request is never split."""
        specs = self._compressed.values()
        policy = max(map(self._policy_bytes, specs), default=0)
        scratch = max(map(self._scratch_bytes, specs), default=KERNEL_SCRATCH_BYTES)
        return max(self.config.workspace_mib << 20, policy) + scratch + self._guard_bytes

    @property
    def _guard_bytes(self) -> int:
        """What it takes to measure a request; 0 where none is."""
        if not self.config.guard_share or not self._compressed:
            return 0
        return SLICE_BYTES + sum(
            reference_bytes(1, self.config.obs_window, self.num_heads[name], spec.head_size)
            for name, spec in self._compressed.items()
        )

    def _policy_bytes(self, spec: CompressedAttentionSpec) -> int:
        num_heads = spec.num_kv_heads
        if not self._is_by_head:
            longest = spec.settings.most_entries(spec.block_size, self.max_model_len)
            return self.policy.workspace_bytes(longest, num_heads, protects=True)
        # Each is a row, and may be as long as the longest.
        return self.policy.workspace_bytes(self.max_model_len * num_heads, 1, protects=True)

    def _scratch_bytes(self, spec: CompressedAttentionSpec) -> int:
        if not self._is_by_head:
            return KERNEL_SCRATCH_BYTES
        # One of them may keep a whole prompt.
        longest = self.max_model_len
        itemsize = spec.dtype.itemsize
        return merge_scratch_bytes(spec.num_kv_heads, longest, longest, spec.head_size, itemsize)

    def score_bytes(self, num_blocks: int) -> int:
        """Of the score pages: one for every block, and the private ones."""
        return score_bytes(self._compressed.values(), num_blocks)

    def ring_bytes(self, num_blocks: int) -> int:
        """Of the query rings."""
        return sum(self._ring_bytes(name, num_blocks) for name in self._compressed)

    def total_bytes(self, num_blocks: int) -> int:
        """All of it, in a cache of `num_blocks` blocks."""
        grows = self.score_bytes(num_blocks) + self.ring_bytes(num_blocks)
        return self.workspace_bytes + grows + self.head_bytes(num_blocks)

    def head_bytes(self, num_blocks: int) -> int:
        """Of the tables of kv_heads, and of the queries of a layer, which are put in their order.

        0 where all kv_heads of a layer keep as much.
        """
        if not self._is_by_head or not self._compressed:
            return 0
        kinds = Counter(self._compressed.values())
        # vLLM cuts the layers of a kind into groups of the size of the smallest.
        smallest = min(kinds.values())
        tables = 0
        for spec, num_layers in kinds.items():
            num_groups = -(-num_layers // smallest)
            num_columns = -(-self.max_model_len // spec.block_size)
            of_group = batch_bytes(self.max_num_reqs, num_columns, spec.num_kv_heads)
            tables += num_groups * of_group
            tables += num_layers * page_start_bytes(self.max_num_seqs, spec.num_kv_heads)
        return tables + max(self._ring_bytes(name, num_blocks) for name in self._compressed)

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

    @property
    def _is_by_head(self) -> bool:
        return self.config.allocator.deals_to_heads

    def _ring_bytes(self, name: str, num_blocks: int) -> int:
        """Of the query ring of a layer."""
        spec = self._compressed[name]
        num_heads, itemsize = self.num_heads[name], self.query_itemsize
        row = QueryRing.row_bytes(self.config.obs_window, num_heads, spec.head_size, itemsize)
        return spec.num_ring_rows(num_blocks, self.max_num_seqs) * row
