# SPDX-License-Identifier: Apache-2.0
"""Compression in a worker of vLLM: what it declares, allocates and does before every step."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from ems_vllm.config import ConfigError, KVCompressionConfig, settings_of
from ems_vllm.engine.attention import override_backends, restore_backends
from ems_vllm.engine.attention.bindings import MetadataRewriter
from ems_vllm.engine.attention.head_rows import read_by_head
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.worker.bind import bind
from ems_vllm.engine.worker.declared_specs import declared_specs
from ems_vllm.engine.worker.group_builder import GroupBuilder
from ems_vllm.engine.worker.inspection import Inspection
from ems_vllm.engine.worker.kept_columns import KeptColumns
from ems_vllm.engine.worker.layer_choice import LayerChoice, choose_layers, mixed_layer
from ems_vllm.engine.worker.memory import Footprint
from ems_vllm.engine.worker.meter import Meter
from ems_vllm.engine.worker.progress_log import ProgressLog
from ems_vllm.engine.worker.refusals import MIXED_GROUP, NO_FULL_ATTENTION
from ems_vllm.engine.worker.reporting import report_steps
from ems_vllm.engine.worker.request_fit import describe_server
from ems_vllm.engine.worker.stages import PipelineStage, Stage
from ems_vllm.engine.worker.start_log import log_start
from ems_vllm.engine.worker.step import StepRunner, batch_order
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    reports the memory, binds the cache, and makes the model runner obey the scheduler's orders.

    Attributes:
        compression: Runs the orders of every step; None until the cache is allocated.
        rewriters: What the attention of each compressed group calls.
        inspection: Tells of requests; None where none are remembered.
    """

    compression: StepRunner | None = None
    rewriters: tuple[MetadataRewriter, ...] = ()
    inspection: Inspection | None = None
    _kv_cache_config: KVCacheConfig | None = None
    _progress_log: ProgressLog | None = None

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        config = settings_of(vllm_config)
        assert config is not None, "a compressing worker was chosen without settings"
        self._compression_config: KVCompressionConfig = config
        self._policy = Policy.from_config(config)
        read_by_head(config.allocator.deals_to_heads)
        override_backends()
        super().__init__(vllm_config, *args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Specs in which the layers that will be compressed say so."""
        specs = super().get_kv_cache_spec()
        choice = choose_layers(specs, self._attention_layers(), self._policy.scorer)
        # A stage of a pipeline may have none while others have; see initialize_from_config.
        if not choice.compressed and not self.parallel_config.pipeline_parallel_size > 1:
            raise self._nothing_to_compress(choice)
        return declared_specs(specs, choice, self._compression_config, self.vllm_config)

    def _nothing_to_compress(self, choice: LayerChoice) -> ConfigError:
        return NO_FULL_ATTENTION.error(
            self.model_config.model,
            self._compression_config.recipe,
            layers=choice.describe_kept() or "none has a KV cache",
        )

    def determine_available_memory(self) -> int:
        """vLLM's figure, less what compression will hold beside the cache."""
        return self._footprint().reduce(super().determine_available_memory())

    def _footprint(self) -> Footprint:
        return Footprint(
            config=self._compression_config,
            policy=self._policy,
            max_model_len=self.model_config.max_model_len,
            max_num_seqs=self.scheduler_config.max_num_seqs,
            max_num_reqs=self._group_builder().max_num_reqs,
            query_itemsize=self.model_config.dtype.itemsize,
            num_heads={name: layer.num_heads for name, layer in self._attention_layers().items()},
            specs=self.get_kv_cache_spec(),
        )

    def _group_builder(self) -> GroupBuilder:
        return GroupBuilder(
            config=self._compression_config,
            policy=self._policy,
            vllm_config=self.vllm_config,
            layers=self._attention_layers(),
            model=self.model_runner.get_model(),
            memory_pool=functools.partial(self._maybe_get_memory_pool_context, "kv_cache"),
            is_heard=self._is_heard,
        )

    @property
    def _is_heard(self) -> bool:
        """Whether the scheduler gets the output of this worker, as of no other."""
        return bool(self.is_driver_worker and get_pp_group().is_last_rank)

    def _attention_layers(self) -> dict[str, Attention]:
        context = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if isinstance(layer, Attention)}

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind scores, rings and metadata builders to it."""
        super().initialize_from_config(kv_cache_config)
        self._check_groups(kv_cache_config)
        self._kv_cache_config = kv_cache_config
        runner, layers, builder = self.model_runner, self._attention_layers(), self._group_builder()
        groups = builder.build(kv_cache_config)
        kept, stage = None, Stage()
        if self._policy.coverage is not None:
            if self.parallel_config.pipeline_parallel_size > 1:
                stage = PipelineStage()
            sizes = {group.tensors.group_id: group.tensors.spec.block_size for group in groups}
            kept = KeptColumns(sizes, stage)
        meter = Meter(groups) if groups and self._is_heard else None
        self.compression = StepRunner(groups, batch_order(runner), kept, meter)
        batch_of = self.compression.batch
        self.rewriters = tuple(builder.rewriter(group, batch_of) for group in groups)
        for rewriter in self.rewriters:
            bind(rewriter, runner, layers)
        if groups and self._compression_config.inspect_requests:
            self.inspection = Inspection(groups, self._compression_config.inspect_text)
        self._observe_steps(runner)
        if meter is not None or (kept is not None and stage.is_last):
            report_steps(runner, self.compression)
        if self.rank == 0:
            self._progress_log = ProgressLog(logger, groups)
            log_start(
                logger,
                self._compression_config,
                kv_cache_config,
                layers,
                self.model_config.max_model_len,
                self._footprint(),
            )

    def _check_groups(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse groups that vLLM put together so that they cannot be compressed."""
        name = mixed_layer(kv_cache_config, self.get_kv_cache_spec())
        if name is not None:
            recipe = self._compression_config.recipe
            raise MIXED_GROUP.error(self.model_config.model, recipe, name=name)
        # The groups of the whole model, also where this stage of a pipeline has no layer of them.
        if not any(
            isinstance(group.kv_cache_spec, CompressedAttentionSpec)
            for group in kv_cache_config.kv_cache_groups
        ):
            specs = super().get_kv_cache_spec()
            choice = choose_layers(specs, self._attention_layers(), self._policy.scorer)
            raise self._nothing_to_compress(choice)

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
            if self.inspection is not None:
                self.inspection.begin_step(scheduler_output)
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

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        super().reload_weights(*args, **kwargs)
        self._read_scales_again()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._read_scales_again()

    def _read_scales_again(self) -> None:
        """A checkpoint brings the scales of its float8 cache with it."""
        builder = self._group_builder()
        for group in self.compression.groups if self.compression is not None else ():
            group.tensors.set_scales(builder.scales(group.layer_names))

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

    def kv_compression_requests(self) -> list[dict[str, Any]] | None:
        """See Inspection.requests; None where none are remembered (for collective_rpc)."""
        return None if self.inspection is None else self.inspection.requests()

    def kv_compression_request(self, req_id: str, num_bins: int) -> dict[str, Any] | None:
        """See Inspection.request (for collective_rpc)."""
        return None if self.inspection is None else self.inspection.request(req_id, num_bins)

    def kv_compression_positions(self, req_id: str, layer: int, kv_head: int) -> list[int] | None:
        """See Inspection.positions (for collective_rpc)."""
        if self.inspection is None:
            return None
        return self.inspection.positions(req_id, layer, kv_head)

    def kv_compression_server(self, lengths: Sequence[int]) -> dict[str, Any]:
        """What this worker holds, and how many requests of some lengths fit (for collective_rpc).

        Args:
            lengths: Tokens of requests; where layers are not compressed nothing is said of them.
        """
        assert self._kv_cache_config is not None
        footprint = self._footprint()
        return describe_server(self._kv_cache_config, footprint, lengths, self.vllm_config)

    def shutdown(self) -> None:
        restore_backends()
        super().shutdown()
