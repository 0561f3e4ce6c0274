# SPDX-License-Identifier: Apache-2.0
"""The worker of the CPU platform, compressing."""

from ems_vllm.cpu_platform.worker import TorchCPUWorker
from ems_vllm.engine.worker.mixin import CompressionWorkerMixin


class CompressedCPUWorker(CompressionWorkerMixin, TorchCPUWorker):
    """Runs either model runner of vLLM on the CPU."""
