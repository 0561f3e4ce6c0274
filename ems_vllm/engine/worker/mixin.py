# SPDX-License-Identifier: Apache-2.0
"""What a worker does more when compression is on."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from ems_vllm.config import ConfigError, KVCompressionConfig
from ems_vllm.engine.active_config import active_config
from ems_vllm.engine.attention import (
    OVERRIDES,
    observable_backend,
    override_backends,
    restore_backends,
)
from ems_vllm.engine.attention.head_rows import read_by_head
from ems_vllm.engine.frontend.compatibility import (
    HEAD_SCALES,
    LAYER_SHARES,
    MIXED_GROUP,
    MIXED_QUERY_HEADS,
    MIXED_SCALES,
    NO_FULL_ATTENTION,
    SPLIT_BLOCKS,
    UNKNOWN_BACKEND,
    unquantised_cache,
)
from ems_vllm.engine.group.cache_scales import has_scales_per_head, layer_scales
from ems_vllm.engine.group.compressed_group import CompressedGroup, GroupTensors
from ems_vllm.engine.group.rope import rotations
from ems_vllm.engine.group.score_store import ScoreStore
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.observation import ObservationSettings, score_tokens
from ems_vllm.engine.worker import start_log as capacity
from ems_vllm.engine.worker.heads import head_tables, split_heads
from ems_vllm.engine.worker.layer_choice import LayerChoice, choose_layers, mixed_layer
from ems_vllm.engine.worker.layer_settings import LayersDiffer, by_layer
from ems_vllm.engine.worker.memory import Footprint
from ems_vllm.engine.worker.progress_log import ProgressLog
from ems_vllm.engine.worker.step import CompressionRuntime, GroupBinding, batch_order
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    # For type checkers; the real base is the worker that this is mixed into.
    from vllm.v1.worker.gpu_worker import Worker as _Base

    from ems_vllm.plan import PlanSettings
else:
    _Base = object

logger = init_logger("vllm.ems")


class CompressionWorkerMixin(_Base):
    """Mixed into a worker class of vLLM, before it in the order of resolution.

    The worker is where everything of the data path meets: it declares the layers' KV-cache specs,
    reports the memory, binds the cache, and makes the model runner obey the scheduler's orders.
    """

    compression: CompressionRuntime | None = None
    _progress_log: ProgressLog | None = None

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        config = active_config(vllm_config)
        assert config is not None, "a compressing worker was chosen without settings"
        self._compression_config: KVCompressionConfig = config
        self._policy = Policy.from_config(config)
        read_by_head(config.allocator.deals_to_heads)
        override_backends()
        super().__init__(vllm_config, *args, **kwargs)

    # -- start-up ------------------------------------------------------------------------------

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Specs in which the layers that will be compressed say so."""
        specs = super().get_kv_cache_spec()
        choice = choose_layers(specs, self._attention_layers(), self._policy.scorer)
        # A stage of a pipeline may have none while others have; see initialize_from_config.
        if not choice.compressed and not self.parallel_config.pipeline_parallel_size > 1:
            raise self._nothing_to_compress(choice)
        settings = self._layer_settings(specs, choice)
        return {
            name: self._compressed_spec(spec, settings[name]) if name in settings else spec
            for name, spec in specs.items()
        }

    def _layer_settings(
        self, specs: dict[str, KVCacheSpec], choice: LayerChoice
    ) -> dict[str, PlanSettings]:
        """Settings of the plan, by compressed layer."""
        config = self._compression_config
        num_layers = self.model_config.get_total_num_hidden_layers()
        settings = config.plan_settings_of(num_layers)
        try:
            return by_layer(settings, specs, choice.compressed)
        except LayersDiffer as error:
            raise LAYER_SHARES.error(config.allocator.name(), config.recipe, reason=error) from None

    def _nothing_to_compress(self, choice: LayerChoice) -> ConfigError:
        return NO_FULL_ATTENTION.error(
            self.model_config.model,
            self._compression_config.recipe,
            layers=choice.describe_kept(),
        )

    def _compressed_spec(self, spec: Any, settings: Any) -> CompressedAttentionSpec:
        config, scorer = self._compression_config, self._policy.scorer
        observation = ObservationSettings(
            obs_window=config.obs_window if scorer.uses_window else 0,
            score_tokens=score_tokens(
                config.prefix_score_tokens,
                settings.most_entries(spec.block_size, self.model_config.max_model_len),
                self.scheduler_config.max_num_batched_tokens,
            )
            if scorer.uses_global
            else None,
            ring_rows=config.query_ring_rows,
        )
        return CompressedAttentionSpec.compress(spec, settings, observation)

    def determine_available_memory(self) -> int:
        """vLLM's figure, less what compression will hold beside the cache."""
        return self._footprint().reduce(super().determine_available_memory())

    def _footprint(self) -> Footprint:
        return Footprint(
            config=self._compression_config,
            policy=self._policy,
            max_model_len=self.model_config.max_model_len,
            max_num_seqs=self.scheduler_config.max_num_seqs,
            max_num_reqs=self._max_num_reqs,
            query_itemsize=self.model_config.dtype.itemsize,
            num_heads={name: layer.num_heads for name, layer in self._attention_layers().items()},
            specs=self.get_kv_cache_spec(),
        )

    @property
    def _max_num_reqs(self) -> int:
        """Rows of the largest batch, CUDA-graph padding included."""
        capture_sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        return max(self.scheduler_config.max_num_seqs, *capture_sizes)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind scores, rings and metadata builders to it."""
        super().initialize_from_config(kv_cache_config)
        name = mixed_layer(kv_cache_config, self.get_kv_cache_spec())
        if name is not None:
            recipe = self._compression_config.recipe
            raise MIXED_GROUP.error(self.model_config.model, recipe, name=name)
        runner = self.model_runner
        layers = self._attention_layers()
        # The groups of the whole model, also where this stage of a pipeline has no layer of them.
        if not any(
            isinstance(group.kv_cache_spec, CompressedAttentionSpec)
            for group in kv_cache_config.kv_cache_groups
        ):
            specs = super().get_kv_cache_spec()
            raise self._nothing_to_compress(choose_layers(specs, layers, self._policy.scorer))
        scores = self._score_store(kv_cache_config, layers)
        groups = [
            self._build_group(group_id, group.kv_cache_spec, group.layer_names, layers, scores)
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            # A pipeline stage may have no layer of a group.
            if group.layer_names and isinstance(group.kv_cache_spec, CompressedAttentionSpec)
        ]
        self.compression = CompressionRuntime(groups, batch_order(runner))
        for group in groups:
            binding = GroupBinding(self.compression, group)
            for attn_group in runner.attn_groups[group.tensors.group_id]:
                for builder in attn_group.metadata_builders:
                    builder.compression = binding
            for name in group.layer_names:
                layers[name].impl.compression = binding.layer(name)
            if group.head_batch is not None:
                split_heads(group, group.head_batch, runner, layers)
        self._observe_steps(runner)
        if self.rank == 0:
            self._progress_log = ProgressLog(logger, groups)
            capacity.log_start(
                logger,
                self._compression_config,
                kv_cache_config,
                layers,
                self.model_config.max_model_len,
                self._footprint(),
            )

    def _score_store(
        self, kv_cache_config: KVCacheConfig, layers: dict[str, Attention]
    ) -> ScoreStore | None:
        """Where all compressed groups keep accumulated scores; None if there are none."""
        if not self._policy.scorer.uses_global:
            return None
        groups = [
            group
            for group in kv_cache_config.kv_cache_groups
            if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
        ]
        owners = [_owners(group.layer_names, layers) for group in groups]
        caches = [layers[name].kv_cache for names in owners for name in names]
        if not caches:
            return None
        return ScoreStore(
            [group.kv_cache_spec for group in groups],
            [len(names) for names in owners],
            caches[0].shape[0],
            caches[0].device,
            # Sleep mode frees what is in this pool, and discards it as it does the cache.
            self._maybe_get_memory_pool_context("kv_cache"),
        )

    def _build_group(
        self,
        group_id: int,
        spec: CompressedAttentionSpec,
        layer_names: list[str],
        layers: dict[str, Attention],
        scores: ScoreStore | None,
    ) -> CompressedGroup:
        owners = _owners(layer_names, layers)
        caches = [layers[name].kv_cache for name in owners]
        recipe = self._compression_config.recipe
        native = caches[0].shape[2]
        if native != spec.block_size:
            raise SPLIT_BLOCKS.error(spec.block_size, recipe, native=native)
        for name in layer_names:
            if not hasattr(layers[name].impl, "compression"):
                backend = layers[name].attn_backend.get_name()
                raise UNKNOWN_BACKEND.error(
                    backend,
                    recipe,
                    known=", ".join(OVERRIDES),
                    choice=observable_backend(backend),
                )
        scales = {float(layers[name].impl.scale) for name in owners}
        if len(scales) > 1:
            raise MIXED_SCALES.error(self.model_config.model, recipe, scales=sorted(scales))
        heads = {layers[name].num_heads for name in owners}
        if len(heads) > 1 and self._policy.scorer.uses_window:
            raise MIXED_QUERY_HEADS.error(self.model_config.model, recipe, heads=sorted(heads))
        for name in owners:
            self._check_scales(name, layers[name])
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
            rotations=rotations(self.model_runner.get_model(), [layers[name] for name in owners]),
            scores=None if scores is None else scores.of(spec, len(owners)),
            pool=self._maybe_get_memory_pool_context("kv_cache"),
        )
        return CompressedGroup(
            tensors,
            owners,
            self._policy,
            workspace_bytes=self._compression_config.workspace_mib << 20,
            max_num_reqs=self._max_num_reqs,
            max_num_tokens=max(scheduler.max_num_batched_tokens, *capture_sizes),
            max_num_columns=_aligned_columns(columns, spec.block_size),
            heads=head_tables(
                self._compression_config, self.vllm_config, spec, layer_names, owners, layers
            ),
        )

    def _attention_layers(self) -> dict[str, Attention]:
        context = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if isinstance(layer, Attention)}

    # -- steps ---------------------------------------------------------------------------------

    def _observe_steps(self, runner: Any) -> None:
        """Compact before every real step of the runner.

        Here, and not in `execute_model` of the worker, because an executor may call the runner
        without it, as Ray's does.
        """
        compression, execute_model = self.compression, runner.execute_model
        assert compression is not None

        @functools.wraps(execute_model)
        def compact_and_execute(
            scheduler_output: SchedulerOutput, *args: Any, dummy_run: bool = False, **kwargs: Any
        ) -> Any:
            if dummy_run:
                return execute_model(scheduler_output, *args, dummy_run=True, **kwargs)
            compression.begin_step(scheduler_output)
            try:
                return execute_model(scheduler_output, *args, **kwargs)
            finally:
                compression.end_step()
                if self._progress_log is not None:
                    self._progress_log.update()

        runner.execute_model = compact_and_execute

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's, whose requests nobody planned."""
        assert self.compression is not None
        with self.compression.warming_up():
            return super().compile_or_warm_up_model()

    # -- new weights ---------------------------------------------------------------------------

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        super().reload_weights(*args, **kwargs)
        self._read_scales_again()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._read_scales_again()

    def _read_scales_again(self) -> None:
        """A checkpoint brings the scales of its float8 cache with it."""
        layers = self._attention_layers()
        for group in self.compression.groups if self.compression is not None else ():
            for name in group.layer_names:
                self._check_scales(name, layers[name])
            group.tensors.set_scales([layer_scales(layers[name]) for name in group.layer_names])

    def _check_scales(self, name: str, layer: Attention) -> None:
        if has_scales_per_head(layer):
            raise HEAD_SCALES.error(
                self.model_config.model,
                self._compression_config.recipe,
                name=name,
                dtype=unquantised_cache(self.vllm_config),
            )

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


def _owners(layer_names: list[str], layers: dict[str, Attention]) -> list[str]:
    """Layers of a group but those that share another one's cache, which are listed too."""
    return [name for name in layer_names if not layers[name].kv_sharing_target_layer_name]


def _aligned_columns(columns: int, block_size: int) -> int:
    """Width of vLLM's block tables, which it rounds up for some kernels."""
    from vllm.v1.worker.block_table import get_block_table_width

    return get_block_table_width(columns, block_size)
