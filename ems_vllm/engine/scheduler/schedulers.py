# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, with a planner beside them.

They come in through `scheduler_cls`. What they override bounds a hit and a chunk, notices that a
request gave its blocks back, sends the orders of a step along with it, reads the report that may
come back, and tells the frontend.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from ems_vllm.config import settings_of
from ems_vllm.engine.orders import attach, attached
from ems_vllm.engine.report import attached_report
from ems_vllm.engine.scheduler.guard import Guard
from ems_vllm.engine.scheduler.kv_cache_manager import CompressedAttentionManager
from ems_vllm.engine.scheduler.planner import Planner
from ems_vllm.engine.scheduler.pressure import Pressure
from ems_vllm.engine.totals import attach_totals
from ems_vllm.vllm_versions import bounds_cache_hits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput

    # For type checkers; the real base is the scheduler that this is mixed into.
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from ems_vllm.config import KVCompressionConfig
else:
    _Base = object


class CompressionSchedulerMixin(_Base):
    """Mixed into a scheduler class of vLLM, before it in the order of resolution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, CompressedAttentionManager)
        ]
        # Without a compressed layer the worker has refused to start.
        assert managers, "a compressing scheduler was chosen, but no layer is compressed"
        config = settings_of(self.vllm_config)
        assert config is not None, "a compressing scheduler was chosen without settings"
        self.planner = Planner(
            managers,
            num_blocks=self.kv_cache_config.num_blocks,
            block_bytes=_block_bytes(self.kv_cache_config) * self.parallel_config.world_size,
            max_num_seqs=self.max_num_running_reqs,
            decode_query_len=1 + self.num_spec_tokens,
            cuts_anywhere=not self.need_mamba_block_aligned_split,
            num_sinks=config.selector.num_sink_tokens,
            is_reported=config.coverage is not None,
            pressure=self._pressure(config),
            guard=Guard(config.guard) if config.guard_share else None,
        )

    def _pressure(self, config: KVCompressionConfig) -> Pressure | None:
        if config.when == "always":
            return None
        return Pressure(
            # One of them stands for columns that were given back.
            self.kv_cache_config.num_blocks - 1,
            config.pressure_usage,
            blocks_of=lambda request, num_tokens: self.planner.blocks_of(request, num_tokens),
            running=lambda: self.running,
            waiting=lambda: self.waiting,
        )

    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> Any:
        """A hit must end where the request's compaction begins to write."""
        limit = self.planner.admit(request)
        if not bounds_cache_hits():
            with CompressedAttentionManager.limit_hits(limit):
                return super()._get_local_prefix_cache_hit(request)
        if limit is not None:
            # None would be all but the last token, of which the logits are wanted.
            if max_cache_hit_length is None:
                max_cache_hit_length = request.num_tokens - 1
            max_cache_hit_length = min(max_cache_hit_length, limit)
        return super()._get_local_prefix_cache_hit(request, max_cache_hit_length)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """The last thing that vLLM asks about the length of a chunk."""
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens == 0:
            return 0
        return self.planner.limit_chunk(request, num_computed_tokens, num_new_tokens)

    def _free_request_blocks(self, request: Request) -> None:
        super()._free_request_blocks(request)
        self.planner.released(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        attach(output, self.planner.orders(output))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        orders = attached(scheduler_output)
        assert orders is not None
        self.planner.processed(orders, attached_report(model_runner_output))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        of_clients = (of_client.outputs for of_client in outputs.values())
        self.planner.accounts.tell(itertools.chain.from_iterable(of_clients))
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        accounts = self.planner.accounts
        num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        accounts.scheduled(num_free, self._dense_blocks())
        if (totals := accounts.take_totals()) is not None:
            attach_totals(stats, totals)
        return stats

    def _dense_blocks(self) -> Iterator[tuple[str, int]]:
        """Requests that run, the last admitted first, and the columns of their block tables."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for request in reversed(self.running):
            req_id = request.request_id
            yield req_id, sum(len(manager.req_to_blocks.get(req_id, ())) for manager in managers)


def _block_bytes(kv_cache_config: KVCacheConfig) -> int:
    """What a block takes on a device; groups with fewer layers leave part of it unused."""
    return max(map(_page_bytes, kv_cache_config.kv_cache_groups))


def _page_bytes(group: KVCacheGroupSpec) -> int:
    spec = group.kv_cache_spec
    # This one's pages are those of all its layers already.
    num_layers = 1 if isinstance(spec, UniformTypeKVCacheSpecs) else len(group.layer_names)
    return int(spec.page_size_bytes * num_layers)


class CompressingScheduler(CompressionSchedulerMixin, Scheduler):
    """For synchronous scheduling."""


class CompressingAsyncScheduler(CompressionSchedulerMixin, AsyncScheduler):
    """For asynchronous scheduling."""
