# SPDX-License-Identifier: Apache-2.0
"""The worker of the CPU platform, compressing."""

from ems_vllm.engine.worker.mixin import CompressionWorkerMixin
from ems_vllm.platform.worker import ReferenceCPUWorker


class CompressedCPUWorker(CompressionWorkerMixin, ReferenceCPUWorker):
    """Runs either model runner of vLLM on the CPU."""
