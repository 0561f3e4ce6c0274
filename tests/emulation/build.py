# SPDX-License-Identifier: Apache-2.0
"""Builds and loads the CUDA kernels for the CPU. `python tests/emulation/build.py` only builds.

The sources are the package's own, .cu files included; the headers in include/ stand in for the
three that touch hardware.
"""

import functools
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
NAMESPACE = "ems_vllm_emulated"


def sources() -> list[Path]:
    """What is compiled: checks and bindings as they are, each kernel through a file that g++ takes
    for C++."""
    plain = sorted(path for path in CSRC.glob("*.cpp") if path.name != "python_bindings.cpp")
    kernels = []
    for path in sorted(CSRC.glob("cuda/*.cu")):
        wrapper = BUILD / f"{path.stem}_kernel.cpp"
        text = f'#include "{path.relative_to(CSRC)}"\n'
        # Written only when it changes, or everything would be compiled every time.
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        kernels.append(wrapper)
    return [*plain, *kernels, *sorted(HERE.glob("*.cpp"))]


@functools.cache
def operators() -> ModuleType:
    """The namespace torch.ops.ems_vllm_emulated, built if need be."""
    BUILD.mkdir(parents=True, exist_ok=True)
    load(
        name=NAMESPACE,
        sources=[str(path) for path in sources()],
        extra_cflags=[
            "-O2",
            "-std=c++20",
            "-fvisibility=hidden",
            f"-DEMS_LIBRARY={NAMESPACE}",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ],
        # Before csrc: the stand-ins win.
        extra_include_paths=[str(HERE / "include"), str(CSRC), str(CSRC / "include")],
        build_directory=str(BUILD),
        is_python_module=False,
    )
    return getattr(torch.ops, NAMESPACE)


if __name__ == "__main__":
    operators()
