# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker, compressing."""

from vllm.v1.worker.gpu_worker import Worker

from ems_vllm.engine.worker.mixin import CompressionWorkerMixin


class CompressedGPUWorker(CompressionWorkerMixin, Worker):
    """Runs either model runner of vLLM."""
