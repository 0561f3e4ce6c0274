# SPDX-License-Identifier: Apache-2.0
"""A worker: declares compressed layers, sizes and binds their cache, obeys the orders of a step."""

# The compressing twin of each worker class; the name travels to every worker process.
WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "ems_vllm.engine.worker.gpu.CompressedGPUWorker",
    "ems_vllm.cpu_platform.worker.TorchCPUWorker": (
        "ems_vllm.engine.worker.cpu.CompressedCPUWorker"
    ),
}
