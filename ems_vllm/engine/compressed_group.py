# SPDX-License-Identifier: Apache-2.0
"""Worker side of one KV-cache group: its tensors, its requests, its attention metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ems_vllm import ops
from ems_vllm.engine.compactor import Compactor
from ems_vllm.engine.head_batch import HeadBatch
from ems_vllm.engine.host_tensors import to_device
from ems_vllm.engine.layer_stack import LayerStack, stack_layers

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vllm.v1.attention.backend import CommonAttentionMetadata

    from ems_vllm.engine.cache_scales import LayerScales
    from ems_vllm.engine.head_tables import HeadTables
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.policies.policy import Policy
    from ems_vllm.policies.rotation import Rotation


@dataclass(frozen=True)
class GroupTensors:
    """What a group holds on the device.

    Attributes:
        group_id: Index of the group among the KV-cache groups.
        spec: Spec of its layers.
        stacks: Its caches, in layer order.
        scores: [num_layers, num_blocks + private pages, num_kv_heads, block_size], float32 -
            accumulated attention by block; None when the policy accumulates none.
        query_ring: [num_layers, num_rows, obs_window, num_heads, head_size] - last queries of the
            requests that are about to be compressed; None when the policy records none.
        obs_window: Recorded queries per request.
        scale: Softmax scale of the layers.
        layer_scales: What a float8 cache and float8 queries are scaled with, in layer order.
        key_scales: [num_layers], float32 - those of the keys; None where the cache is not float8.
        query_dtype: dtype in which queries are recorded and scored.
        rotations: RoPE of the layers, in layer order; None where a layer has none that is known.
    """

    group_id: int
    spec: CompressedAttentionSpec
    stacks: Sequence[LayerStack]
    scores: torch.Tensor | None
    query_ring: torch.Tensor | None
    obs_window: int
    scale: float
    layer_scales: list[LayerScales]
    key_scales: torch.Tensor | None
    query_dtype: torch.dtype
    rotations: Sequence[Rotation | None]

    @classmethod
    def allocate(
        cls,
        *,
        group_id: int,
        spec: CompressedAttentionSpec,
        caches: Sequence[torch.Tensor],
        policy: Policy,
        num_heads: int,
        scale: float,
        layer_scales: Sequence[LayerScales],
        obs_window: int,
        max_num_seqs: int,
        query_dtype: torch.dtype,
        rotations: Sequence[Rotation | None],
        scores: torch.Tensor | None,
        pool: AbstractContextManager[Any],
    ) -> GroupTensors:
        """Allocate a ring beside the caches of a group.

        Args:
            caches: One per layer, in layer order, each [num_blocks, ...].
            num_heads: Query heads of a layer on this rank.
            max_num_seqs: Most requests that run at a time.
            layer_scales: One per layer.
            query_dtype: dtype of the model, in which queries are recorded.
            rotations: One per layer.
            scores: What the group has of the worker's ScoreStore, if anything.
            pool: Where the ring is allocated; its content may get lost between requests.
        """
        device, num_blocks = caches[0].device, caches[0].shape[0]
        ring = None
        if policy.scorer.uses_window:
            num_rows = spec.num_ring_rows(num_blocks, max_num_seqs)
            with pool:
                ring = torch.zeros(
                    (len(caches), num_rows, obs_window, num_heads, spec.head_size),
                    dtype=query_dtype,
                    device=device,
                )
        stacks = stack_layers(caches, spec.num_kv_heads)
        key_scales = None
        if stacks[0].key_cache.dtype == torch.float8_e4m3fn:
            # Of 1 as well: weights that are loaded later may bring others.
            key_scales = torch.tensor(
                [scales.key for scales in layer_scales], dtype=torch.float32, device=device
            )
        return cls(
            group_id=group_id,
            spec=spec,
            stacks=stacks,
            scores=scores,
            query_ring=ring,
            obs_window=obs_window,
            scale=scale,
            layer_scales=list(layer_scales),
            key_scales=key_scales,
            query_dtype=query_dtype,
            rotations=rotations,
        )

    def set_scales(self, layer_scales: Sequence[LayerScales]) -> None:
        """Take the scales that new weights brought, in place; one per layer, in layer order."""
        self.layer_scales[:] = layer_scales
        if self.key_scales is not None:
            self.key_scales.copy_(torch.tensor([scales.key for scales in layer_scales]))

    @property
    def num_layers(self) -> int:
        return sum(stack.num_layers for stack in self.stacks)

    @property
    def num_blocks(self) -> int:
        return self.stacks[0].key_cache.shape[1]

    @property
    def device(self) -> torch.device:
        return self.stacks[0].key_cache.device


class CompressedGroup:
    """Compresses the layers of one KV-cache group.

    Args:
        tensors: What it holds.
        layer_names: Its layers, in the order of the tensors.
        policy: What stays and what is merged.
        workspace_bytes: Bound of the scratch memory of a compaction.
        max_num_reqs, max_num_tokens: Largest batch, CUDA-graph padding included.
        max_num_columns: Width of vLLM's block tables.
        heads: What kv_heads own; None where all of a layer keep as much.

    Attributes:
        heads: As given.
        head_batch: The batch with a row for each kv_head; None where all keep as much.
    """

    def __init__(
        self,
        tensors: GroupTensors,
        layer_names: Sequence[str],
        policy: Policy,
        *,
        workspace_bytes: int,
        max_num_reqs: int,
        max_num_tokens: int,
        max_num_columns: int,
        heads: HeadTables | None = None,
    ) -> None:
        self.tensors = tensors
        self.layer_names = list(layer_names)
        self.global_stride = policy.scorer.global_stride
        self._compactor = Compactor(tensors, policy, workspace_bytes, heads)
        self.counters = self._compactor.counters
        device = tensors.device
        # CUDA graphs capture the addresses of these three; they never move.
        self.ring_slots = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(
            (max_num_reqs, max_num_columns), dtype=torch.int32, device=device
        )
        self._seq_lens = torch.zeros((max_num_reqs,), dtype=torch.int32, device=device)
        self.heads = heads
        self.head_batch = None
        if heads is not None:
            self.head_batch = HeadBatch(
                heads, tensors.spec.block_size, self._block_table, self._seq_lens
            )

    def release(self, req_ids: Sequence[str]) -> None:
        """Requests gave their blocks back."""
        self._compactor.protected.release(req_ids)
        if self.heads is not None:
            self.heads.release(req_ids)

    def compact(self, orders: Sequence[Compaction]) -> None:
        """Compress requests of this group, before anything of the step runs."""
        self._compactor.compact(orders)

    def rewrite(
        self, metadata: CommonAttentionMetadata, first_columns: np.ndarray, max_seq_len: int | None
    ) -> CommonAttentionMetadata:
        """Metadata in which every request begins at its first live column.

        Args:
            metadata: vLLM's, for the whole batch.
            first_columns: [at most num_reqs] - of the leading rows; the remaining ones are padding.
            max_seq_len: Longest rewritten sequence, or None to keep vLLM's.
        """
        num_reqs = metadata.num_reqs
        block_table = self._block_table[:num_reqs, : metadata.block_table_tensor.shape[1]]
        seq_lens = self._seq_lens[:num_reqs]
        padded = np.zeros(num_reqs, np.int32)
        padded[: len(first_columns)] = first_columns
        ops.shift_block_tables(
            metadata.block_table_tensor,
            metadata.seq_lens,
            to_device(padded, self.tensors.device),
            self.tensors.spec.block_size,
            block_table,
            seq_lens,
        )
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound = upper_bound - torch.from_numpy(padded) * self.tensors.spec.block_size
        # Image tokens that see each other are counted from the first live column too; where there
        # is one, they have been compressed.
        images = metadata.mm_req_doc_ranges or {}
        return metadata.replace(
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            max_seq_len=metadata.max_seq_len if max_seq_len is None else max_seq_len,
            seq_lens_cpu_upper_bound=upper_bound,
            _num_computed_tokens_cache=None,
            mm_req_doc_ranges={row: spans for row, spans in images.items() if not padded[row]}
            or None,
        )
