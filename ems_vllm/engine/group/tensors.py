# SPDX-License-Identifier: Apache-2.0
"""Tensors of one KV-cache group on a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.engine.group.layer_stack import LayerStack, stack_layers

if TYPE_CHECKING:
    from ems_vllm.engine.group.cache_scales import LayerScales
    from ems_vllm.engine.group.query_ring import QueryRing
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
    from ems_vllm.policies.rotation import Rotation


@dataclass(frozen=True)
class GroupTensors:
    """Tensors of one KV-cache group on the device.

    Attributes:
        group_id: Index of the group among the KV-cache groups.
        spec: Spec of its layers.
        stacks: Its caches, in layer order.
        scores: [num_layers, num_blocks + private pages, num_kv_heads, block_size], float32 -
            accumulated attention by block; None when the policy accumulates none.
        query_ring: Last queries of the requests that are about to be compressed; None when the
            policy records none.
        scale: Softmax scale of the layers.
        layer_scales: Factors of a float8 cache and of float8 queries, in layer order.
        key_scales: [num_layers], float32 - those of the keys; None where the cache is not float8.
        query_dtype: dtype in which queries are recorded and scored.
        rotations: RoPE of the layers, in layer order; None where a layer has none that is known.
        sample_stride: Of the prompt's queries, one in so many is accumulated.
        output_weights: Of the layers' output projections, in layer order; see CompactionContext.
        layer_ids: Indices of the layers in the model.
        first_head, first_kv_head: Of this rank's query heads and kv_heads the first one's index
            among the layer's.
    """

    group_id: int
    spec: CompressedAttentionSpec
    stacks: Sequence[LayerStack]
    scores: torch.Tensor | None
    query_ring: QueryRing | None
    scale: float
    layer_scales: list[LayerScales]
    key_scales: torch.Tensor | None
    query_dtype: torch.dtype
    rotations: Sequence[Rotation | None]
    sample_stride: int
    output_weights: Sequence[torch.Tensor]
    layer_ids: Sequence[int]
    first_head: int
    first_kv_head: int

    @classmethod
    def bind(
        cls,
        *,
        group_id: int,
        spec: CompressedAttentionSpec,
        caches: Sequence[torch.Tensor],
        scores: torch.Tensor | None,
        query_ring: QueryRing | None,
        scale: float,
        layer_scales: Sequence[LayerScales],
        query_dtype: torch.dtype,
        rotations: Sequence[Rotation | None],
        sample_stride: int,
        layer_ids: Sequence[int],
        output_weights: Sequence[torch.Tensor] = (),
        first_head: int = 0,
        first_kv_head: int = 0,
    ) -> GroupTensors:
        """Bring the caches of a group together with what is kept beside them.

        Args:
            caches: One per layer, in layer order, each [num_blocks, ...].
        """
        stacks = stack_layers(caches, spec.num_kv_heads)
        key_scales = None
        if stacks[0].key_cache.dtype == torch.float8_e4m3fn:
            # Of 1 as well: weights that are loaded later may bring others.
            key_scales = torch.tensor(
                [scales.key for scales in layer_scales],
                dtype=torch.float32,
                device=caches[0].device,
            )
        return cls(
            group_id=group_id,
            spec=spec,
            stacks=stacks,
            scores=scores,
            query_ring=query_ring,
            scale=scale,
            layer_scales=list(layer_scales),
            key_scales=key_scales,
            query_dtype=query_dtype,
            rotations=rotations,
            sample_stride=sample_stride,
            output_weights=output_weights,
            layer_ids=list(layer_ids),
            first_head=first_head,
            first_kv_head=first_kv_head,
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
