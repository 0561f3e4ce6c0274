# SPDX-License-Identifier: Apache-2.0
"""Where a null GPU is built, and the environment in which programs find it."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "nullgpu"
LIB = BUILD / "lib"
SITE = BUILD / "site"
COMPUTING_SITE = BUILD / "site-computing"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def site_packages() -> Path:
    """Where torch and vLLM of this environment lie."""
    return Path(sysconfig.get_paths()["purelib"])


def environment(*, computes: bool = False) -> dict[str, str]:
    """In which programs find the null GPU, and this package for it.

    Args:
        computes: Whether this package's kernels compute.
    """
    site = COMPUTING_SITE if computes else SITE
    paths = [str(site), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    libraries = [str(LIB), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {
        "PATH": os.pathsep.join([str(HERE / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in libraries if path),
        "TRITON_LIBCUDA_PATH": str(LIB),
        "NULLGPU_COUNT": os.environ.get("NULLGPU_COUNT", "1"),
        "EMS_EMULATED_CAPABILITY": os.environ.get("NULLGPU_CAPABILITY", "90"),
        "OMP_NUM_THREADS": "1",
    }
