# SPDX-License-Identifier: Apache-2.0
"""What a worker does more when compression is on."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from ems_vllm.config import KVCompressionConfig
from ems_vllm.engine import capacity
from ems_vllm.engine.active_config import active_config
from ems_vllm.engine.backends import OVERRIDES, override_backends, restore_backends
from ems_vllm.engine.cache_scales import has_scales_per_head, layer_scales
from ems_vllm.engine.compatibility import (
    HEAD_SCALES,
    MIXED_GROUP,
    MIXED_SCALES,
    NO_FULL_ATTENTION,
    SPLIT_BLOCKS,
    UNKNOWN_BACKEND,
)
from ems_vllm.engine.compressed_group import CompressedGroup, GroupTensors
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.layer_choice import choose_layers, mixed_layer
from ems_vllm.engine.memory import Footprint
from ems_vllm.engine.progress_log import ProgressLog
from ems_vllm.engine.runtime import CompressionRuntime, GroupBinding, batch_order
from ems_vllm.engine.score_pages import num_prefix_score_pages
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    # For type checkers; the real base is the worker that this is mixed into.
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object

logger = init_logger("vllm.ems")


class CompressionWorkerMixin(_Base):
    """Mixed into a worker class of vLLM, before it in the order of resolution.

    The worker is where everything of the data path meets: it declares the layers' KV-cache specs,
    reports the memory, binds the cache, and sees every scheduler output before the model runs.
    """

    compression: CompressionRuntime | None = None
    _progress_log: ProgressLog | None = None

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        config = active_config(vllm_config)
        assert config is not None, "a compressing worker was chosen without settings"
        self._compression_config: KVCompressionConfig = config
        self._policy = Policy.from_config(config)
        override_backends()
        super().__init__(vllm_config, *args, **kwargs)

    # -- start-up ------------------------------------------------------------------------------

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Specs in which the layers that will be compressed say so."""
        specs = super().get_kv_cache_spec()
        choice = choose_layers(specs, self._attention_layers(), self._policy.scorer)
        if not choice.compressed and not self.parallel_config.pipeline_parallel_size > 1:
            raise NO_FULL_ATTENTION.error(
                self.model_config.model,
                self._compression_config.recipe,
                layers=choice.describe_kept(),
            )
        settings = self._policy.allocator.settings(self._compression_config.plan_settings)
        return {
            name: self._compressed_spec(spec, settings) if name in choice.compressed else spec
            for name, spec in specs.items()
        }

    def _compressed_spec(self, spec: Any, settings: Any) -> CompressedAttentionSpec:
        pages = None
        if self._policy.scorer.uses_global:
            pages = num_prefix_score_pages(
                self._compression_config.prefix_score_tokens,
                self.model_config.max_model_len,
                self.scheduler_config.max_num_batched_tokens,
                spec.block_size,
            )
        return CompressedAttentionSpec.compress(spec, settings, pages)

    def determine_available_memory(self) -> int:
        """vLLM's figure, less what compression will hold beside the cache."""
        available = super().determine_available_memory()
        return self._footprint().reduce(available, self.get_kv_cache_spec())

    def _footprint(self) -> Footprint:
        return Footprint(
            config=self._compression_config,
            policy=self._policy,
            max_model_len=self.model_config.max_model_len,
            max_num_seqs=self.scheduler_config.max_num_seqs,
            query_itemsize=self.model_config.dtype.itemsize,
            num_heads={name: layer.num_heads for name, layer in self._attention_layers().items()},
        )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind scores, rings and metadata builders to it."""
        super().initialize_from_config(kv_cache_config)
        name = mixed_layer(kv_cache_config, self.get_kv_cache_spec())
        if name is not None:
            recipe = self._compression_config.recipe
            raise MIXED_GROUP.error(self.model_config.model, recipe, name=name)
        runner = self.model_runner
        layers = self._attention_layers()
        groups = [
            self._build_group(group_id, group.kv_cache_spec, group.layer_names, layers)
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            # A pipeline stage may have no layer of a group.
            if group.layer_names and isinstance(group.kv_cache_spec, CompressedAttentionSpec)
        ]
        self.compression = CompressionRuntime(
            groups, self.scheduler_config.max_num_seqs, batch_order(runner)
        )
        for group in groups:
            binding = GroupBinding(self.compression, group)
            for attn_group in runner.attn_groups[group.tensors.group_id]:
                for builder in attn_group.metadata_builders:
                    builder.compression = binding
            for name in group.layer_names:
                layers[name].impl.compression = binding.layer(name)
        if self.rank == 0:
            self._progress_log = ProgressLog(logger, groups)
            capacity.log_start(
                logger, self._compression_config, kv_cache_config, self.model_config.max_model_len
            )

    def _build_group(
        self,
        group_id: int,
        spec: CompressedAttentionSpec,
        layer_names: list[str],
        layers: dict[str, Attention],
    ) -> CompressedGroup:
        # Layers that share another layer's cache are listed too; they own none.
        owners = [name for name in layer_names if not layers[name].kv_sharing_target_layer_name]
        caches = [layers[name].kv_cache for name in owners]
        recipe = self._compression_config.recipe
        native = caches[0].shape[2]
        if native != spec.block_size:
            raise SPLIT_BLOCKS.error(spec.block_size, recipe, native=native)
        for name in layer_names:
            if not hasattr(layers[name].impl, "compression"):
                backend = layers[name].attn_backend.get_name()
                raise UNKNOWN_BACKEND.error(backend, recipe, known=", ".join(OVERRIDES))
        scales = {float(layers[name].impl.scale) for name in owners}
        if len(scales) > 1:
            raise MIXED_SCALES.error(self.model_config.model, recipe, scales=sorted(scales))
        for name in owners:
            if has_scales_per_head(layers[name]):
                raise HEAD_SCALES.error(self.model_config.model, recipe, name=name)
        scheduler = self.scheduler_config
        capture_sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        columns = spec.max_num_blocks_per_req(self.vllm_config, self.model_config.max_model_len)
        tensors = GroupTensors.allocate(
            group_id=group_id,
            spec=spec,
            caches=caches,
            policy=self._policy,
            num_heads=layers[owners[0]].num_heads,
            scale=scales.pop(),
            layer_scales=[layer_scales(layers[name]) for name in owners],
            obs_window=self._compression_config.obs_window,
            max_num_seqs=scheduler.max_num_seqs,
            query_dtype=self.model_config.dtype,
        )
        return CompressedGroup(
            tensors,
            owners,
            self._policy,
            workspace_bytes=self._compression_config.workspace_mib << 20,
            max_num_reqs=max(scheduler.max_num_seqs, *capture_sizes),
            max_num_tokens=max(scheduler.max_num_batched_tokens, *capture_sizes),
            max_num_columns=_aligned_columns(columns, spec.block_size),
        )

    def _attention_layers(self) -> dict[str, Attention]:
        context = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if isinstance(layer, Attention)}

    # -- steps ---------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Compact the requests that are due, then run the step."""
        assert self.compression is not None
        self.compression.begin_step(scheduler_output)
        try:
            return super().execute_model(scheduler_output)
        finally:
            self.compression.end_step()
            if self._progress_log is not None:
                self._progress_log.update()

    def kv_compression_stats(self) -> list[dict[str, int]]:
        """Counters of every compressed group since the start (for collective_rpc)."""
        assert self.compression is not None
        return [
            {
                "group_id": group.tensors.group_id,
                "num_layers": len(group.layer_names),
                "num_running": self.compression.num_running,
                **asdict(group.counters),
            }
            for group in self.compression.groups
        ]

    def shutdown(self) -> None:
        restore_backends()
        super().shutdown()


def _aligned_columns(columns: int, block_size: int) -> int:
    """Width of vLLM's block tables, which it rounds up for some kernels."""
    from vllm.v1.worker.block_table import get_block_table_width

    return get_block_table_width(columns, block_size)
