# SPDX-License-Identifier: Apache-2.0
"""Head-wise KV cache compression for vLLM. Importing this package loads neither torch nor vLLM."""

from typing import Any

from ems_vllm._version import __version__

__all__ = ["__version__", "build_info"]


def build_info() -> dict[str, Any]:
    """Describe the compiled part of this installation.

    Returns:
        A new dict: `version`, `compiler`, `torch_target` (oldest torch the operators load on),
        `cpu_variants` (instruction sets compiled in, best first), `cuda_archs` (GPU architectures
        compiled in, in torch's notation; empty for a CPU-only build), `cuda_compiler`,
        `cuda_head_sizes` (those that the kernels take on a GPU; empty for a CPU-only build),
        `cpu_dtypes` and `cuda_dtypes` (pairs of torch's names: queries of the first dtype are
        scored with a cache of the second; the latter empty for a CPU-only build).
    Raises:
        ImportError: the extension modules have not been built.
    """
    from ems_vllm import _C

    return _C.build_info()
