# SPDX-License-Identifier: Apache-2.0
"""Builds the compressed groups of a worker, once vLLM has allocated the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.worker.block_table import get_block_table_width

from ems_vllm.engine.attention.bindings import MetadataRewriter
from ems_vllm.engine.attention.head_batch import HeadBatch
from ems_vllm.engine.attention.live_columns import LiveColumns
from ems_vllm.engine.cache_dtype import unquantised_cache
from ems_vllm.engine.group.cache_scales import LayerScales, has_scales_per_head, layer_scales
from ems_vllm.engine.group.compressed_group import CompressedGroup
from ems_vllm.engine.group.divergence import Divergence
from ems_vllm.engine.group.kept_positions import KeptPositions
from ems_vllm.engine.group.output_projection import output_weights
from ems_vllm.engine.group.query_ring import QueryRing
from ems_vllm.engine.group.rope import rotations
from ems_vllm.engine.group.score_store import ScoreStore
from ems_vllm.engine.group.tensors import GroupTensors
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.worker.head_tables import head_tables
from ems_vllm.engine.worker.layer_checks import (
    check_backends,
    check_profile,
    check_query_heads,
    common_scale,
)
from ems_vllm.engine.worker.ranks import RANKS
from ems_vllm.engine.worker.refusals import HEAD_SCALES, NO_OUTPUT_WEIGHTS, SPLIT_BLOCKS

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from ems_vllm.config import ConfigError, KVCompressionConfig
    from ems_vllm.engine.group.batch import BatchOf
    from ems_vllm.policies.policy import Policy


@dataclass(frozen=True)
class GroupBuilder:
    """Builds groups and what binds attention to them.

    Attributes:
        config: Settings of the server.
        policy: Made of them.
        vllm_config: vLLM's.
        layers: vLLM's attention layers by name, with their caches.
        model: The loaded model.
        memory_pool: Opens the pool where vLLM allocates the cache: sleep mode frees what is in it,
            and discards it as it does the cache.
        is_heard: Whether the scheduler gets the output of this worker.
    """

    config: KVCompressionConfig
    policy: Policy
    vllm_config: VllmConfig
    layers: Mapping[str, Attention]
    model: nn.Module
    memory_pool: Callable[[], AbstractContextManager[Any]]
    is_heard: bool = True

    @property
    def max_num_reqs(self) -> int:
        """Rows of the largest batch, CUDA-graph padding included."""
        return max(self.vllm_config.scheduler_config.max_num_seqs, *self._capture_sizes)

    @property
    def _capture_sizes(self) -> list[int]:
        return self.vllm_config.compilation_config.cudagraph_capture_sizes or [0]

    def build(self, kv_cache_config: KVCacheConfig) -> list[CompressedGroup]:
        """The compressed groups of which this worker has layers.

        Raises:
            ConfigError: layers or their attention backend cannot be compressed.
        """
        groups = {
            group_id: group
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
        }
        scores = self._score_store(list(groups.values()))
        return [
            self.group(group_id, group.kv_cache_spec, group.layer_names, scores)
            for group_id, group in groups.items()
            # A pipeline stage may have no layer of a group.
            if group.layer_names
        ]

    def group(
        self,
        group_id: int,
        spec: CompressedAttentionSpec,
        layer_names: Sequence[str],
        scores: ScoreStore | None,
    ) -> CompressedGroup:
        """One group.

        Raises:
            ConfigError: as for `build`.
        """
        owners = self._owners(layer_names)
        scale = self._check(spec, layer_names, owners)
        layer_ids = [extract_layer_index(name) for name in owners]
        num_heads = self.layers[owners[0]].num_heads * get_tp_group().world_size
        check_profile(layer_ids, num_heads, self.policy.scorer, self.config.recipe)
        layer = self.layers[owners[0]]
        first_head = get_tp_group().rank_in_group * layer.num_heads
        tensors = GroupTensors.bind(
            group_id=group_id,
            spec=spec,
            caches=[self.layers[name].kv_cache for name in owners],
            scores=None if scores is None else scores.of(spec, len(owners)),
            query_ring=self._query_ring(spec, owners),
            scale=scale,
            layer_scales=self.scales(owners),
            query_dtype=self.vllm_config.model_config.dtype,
            rotations=rotations(self.model, [self.layers[name] for name in owners]),
            sample_stride=self.config.sample_stride,
            output_weights=self._output_weights(owners),
            layer_ids=layer_ids,
            first_head=first_head,
            # Ranks may share one.
            first_kv_head=first_head // (layer.num_heads // layer.num_kv_heads),
        )
        heads = head_tables(self.config, self.vllm_config, spec, layer_names, owners, self.layers)
        workspace_bytes = self.config.workspace_mib << 20
        positions = None
        if num_inspected := self.config.inspect_requests:
            positions = KeptPositions(spec.block_size, tensors.device, num_inspected)
        divergence = Divergence() if self.config.guard_share and self.is_heard else None
        return CompressedGroup(
            tensors, owners, self.policy, workspace_bytes, heads, RANKS, positions, divergence
        )

    def rewriter(self, group: CompressedGroup, batch_of: BatchOf) -> MetadataRewriter:
        """What the metadata builders of a group call."""
        spec, device = group.tensors.spec, group.tensors.device
        max_model_len = self.vllm_config.model_config.max_model_len
        columns = spec.max_num_blocks_per_req(self.vllm_config, max_model_len)
        # vLLM rounds the width of its block tables up for some kernels.
        width = get_block_table_width(columns, spec.block_size)
        live = LiveColumns(spec.block_size, self.max_num_reqs, width, device)
        head_batch = None
        if group.heads is not None:
            head_batch = HeadBatch(group.heads, spec.block_size, live.block_table, live.seq_lens)
        return MetadataRewriter(group, batch_of, live, head_batch)

    def scales(self, layer_names: Sequence[str]) -> list[LayerScales]:
        """Scales of layers, as loaded.

        Raises:
            ConfigError: a checkpoint scales every kv_head on its own.
        """
        for name in layer_names:
            if has_scales_per_head(self.layers[name]):
                dtype = unquantised_cache(self.vllm_config)
                raise self._refused(HEAD_SCALES, name=name, dtype=dtype)
        return [layer_scales(self.layers[name]) for name in layer_names]

    def _owners(self, layer_names: Sequence[str]) -> list[str]:
        """Layers of a group but those that share another one's cache, which are listed too."""
        return [n for n in layer_names if not self.layers[n].kv_sharing_target_layer_name]

    def _check(
        self, spec: CompressedAttentionSpec, layer_names: Sequence[str], owners: Sequence[str]
    ) -> float:
        """The softmax scale of a group that can be compressed."""
        native = self.layers[owners[0]].kv_cache.shape[2]
        if native != spec.block_size:
            raise SPLIT_BLOCKS.error(spec.block_size, self.config.recipe, native=native)
        model, recipe = self.vllm_config.model_config.model, self.config.recipe
        check_backends(self.layers, layer_names, recipe)
        scale = common_scale(self.layers, owners, model, recipe)
        check_query_heads(self.layers, owners, self.policy.scorer, model, recipe)
        return scale

    def _output_weights(self, owners: Sequence[str]) -> list[torch.Tensor]:
        if not self.policy.selector.reads_output_weights:
            return []
        found = output_weights(self.model, [self.layers[name] for name in owners])
        for name, weight in zip(owners, found, strict=True):
            if weight is None:
                selector = self.policy.selector.name()
                raise NO_OUTPUT_WEIGHTS.error(selector, self.config.recipe, name=name)
        return [weight for weight in found if weight is not None]

    def _refused(self, refusal: Any, **details: Any) -> ConfigError:
        model = self.vllm_config.model_config.model
        error: ConfigError = refusal.error(model, self.config.recipe, **details)
        return error

    def _query_ring(self, spec: CompressedAttentionSpec, owners: Sequence[str]) -> QueryRing | None:
        if not self.policy.scorer.uses_window:
            return None
        cache, scheduler = self.layers[owners[0]].kv_cache, self.vllm_config.scheduler_config
        return QueryRing(
            num_layers=len(owners),
            num_rows=spec.num_ring_rows(cache.shape[0], scheduler.max_num_seqs),
            obs_window=self.config.obs_window,
            num_heads=self.layers[owners[0]].num_heads,
            head_size=spec.head_size,
            max_num_tokens=max(scheduler.max_num_batched_tokens, *self._capture_sizes),
            dtype=self.vllm_config.model_config.dtype,
            device=cache.device,
            pool=self.memory_pool(),
        )

    def _score_store(self, groups: Sequence[KVCacheGroupSpec]) -> ScoreStore | None:
        """Where all compressed groups keep accumulated scores; None if there are none."""
        if not self.policy.scorer.uses_accumulated:
            return None
        owners = [self._owners(group.layer_names) for group in groups]
        caches: list[torch.Tensor] = [
            self.layers[name].kv_cache for names in owners for name in names
        ]
        if not caches:
            return None
        return ScoreStore(
            [group.kv_cache_spec for group in groups],
            [len(names) for names in owners],
            caches[0].shape[0],
            caches[0].device,
            self.memory_pool(),
        )
