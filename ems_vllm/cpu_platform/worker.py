# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker without its compiled kernels."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from vllm.config import VllmConfig
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from ems_vllm.cpu_platform.generators import make_generators_rewindable


class TorchCPUWorker(CPUWorker):
    """Either model runner on PyTorch operators."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        # CPUWorker.__init__ is skipped: it binds memory to NUMA nodes with a compiled kernel.
        Worker.__init__(
            self, vllm_config, local_rank, rank, distributed_init_method, is_driver_worker
        )
        self.parallel_config.disable_custom_all_reduce = True

    def init_device(self) -> None:
        set_num_threads = torch.set_num_threads
        with _without_preload_warnings():
            super().init_device()
        # CPUWorker takes this away from the whole process; nothing is bound to cores here.
        torch.set_num_threads = set_num_threads
        if not self.use_v2_model_runner:
            make_generators_rewindable(self.model_runner)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext()

    def determine_available_memory(self) -> int:
        if self.parallel_config.pipeline_parallel_size > 1:
            # A later stage receives into buffers that only a profiling run allocates.
            self.model_runner.profile_run()
        return super().determine_available_memory()


@contextmanager
def _without_preload_warnings() -> Iterator[None]:
    """Silence advice on preloading libraries, which concerns the compiled kernels."""

    def keep(record: logging.LogRecord) -> bool:
        return "LD_PRELOAD" not in str(record.msg)

    cpu_worker.logger.addFilter(keep)
    try:
        yield
    finally:
        cpu_worker.logger.removeFilter(keep)
