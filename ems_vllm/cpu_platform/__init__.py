# SPDX-License-Identifier: Apache-2.0
"""A platform that runs vLLM's engine on a machine without a GPU, with PyTorch operators only."""

import os
import warnings
from importlib import metadata

_SWITCH = "EMS_CPU_PLATFORM"


def cpu_platform() -> str | None:
    """Offer the CPU platform to vLLM (entry point `vllm.platform_plugins`).

    It offers itself where torch has no accelerator build. `EMS_CPU_PLATFORM=0` withdraws it and
    `EMS_CPU_PLATFORM=1` insists on it. A vLLM that was built for CPUs brings faster kernels, so
    that build keeps its own platform.

    Returns:
        The platform's class path, or None to leave the choice to vLLM.
    Note:
        vLLM calls this in each of its processes, while `vllm.platforms` is still being resolved:
        it must not import vllm.
    """
    switch = os.environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        warnings.warn(f"{_SWITCH}={switch!r} is neither 0 nor 1; ignored", stacklevel=2)
    offered = switch == "1" or (switch != "0" and not _has_own_platform())
    return "ems_vllm.cpu_platform.cpu.TorchCPUPlatform" if offered else None


def _has_own_platform() -> bool:
    """Whether the installed torch and vLLM can run without ours."""
    import torch

    if torch.version.cuda or torch.version.hip or torch.xpu.is_available():
        return True
    return "cpu" in metadata.version("vllm")
