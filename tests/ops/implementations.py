# SPDX-License-Identifier: Apache-2.0
"""The implementations of the operators that the tests of this folder run over, one by one.

cpu       the CPU kernels
emulated  the CUDA kernels on the emulator of tests/emulation, with the shared memory of the
          smallest GPUs
sm90      the same with what only compute capability 9.0a has, where a kernel uses it
cuda      the CUDA kernels on a GPU, on copies of the CPU tensors that a test makes
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from ems_vllm.ops.library import operators

# The kernels of 8.9 are those of 8.0, with 99 KiB instead of 163.
EMULATED_CAPABILITIES = {"emulated": "89", "sm90": "90"}


class _OnGpu:
    """The operators' namespace for CPU tensors, run on the GPU."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        operator = getattr(operators(), name)

        def run(*args: Any, **kwargs: Any) -> None:
            storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            moved = [_to_gpu(arg, storages) for arg in args]
            named = {key: _to_gpu(arg, storages) for key, arg in kwargs.items()}
            operator(*moved, **named)
            torch.cuda.synchronize()
            for here, there in storages.values():
                here.copy_(there)

        return run


def _to_gpu(arg: Any, storages: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A view with the same strides; arguments that share memory go on sharing it."""
    if not isinstance(arg, torch.Tensor):
        return arg
    storage = arg.untyped_storage()
    if storage.data_ptr() not in storages:
        here = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[storage.data_ptr()] = here, here.cuda()
    there = storages[storage.data_ptr()][1].view(arg.dtype)
    return there.as_strided(arg.size(), arg.stride(), arg.storage_offset())


def namespace(implementation: str) -> Any:
    """What stands for torch.ops.ems_vllm."""
    if implementation in EMULATED_CAPABILITIES:
        from emulation.build import operators as emulated

        os.environ["EMS_EMULATED_CAPABILITY"] = EMULATED_CAPABILITIES[implementation]
        return emulated()
    return _OnGpu() if implementation == "cuda" else operators()
