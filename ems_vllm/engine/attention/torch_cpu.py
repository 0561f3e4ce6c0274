# SPDX-License-Identifier: Apache-2.0
"""The CPU platform's backend, wrapped."""

from ems_vllm.cpu_platform.attention import TorchCPUBackend
from ems_vllm.engine.attention.wrap import wrap_backend

CompressedTorchCPUBackend = wrap_backend(TorchCPUBackend, __name__)
