# SPDX-License-Identifier: Apache-2.0
"""Builds a null GPU, and this package for it: `python tests/nullgpu/build.py`, from the environment
that `make test-nullgpu` makes.

Into build/nullgpu/:
    lib/             CUDA's libraries (libraries.py).
    site/            A copy of ems_vllm whose operators are the objects that `make build` compiled,
                     linked with that runtime (package.py).
    site-computing/  Another whose kernels compute: they are work of a stream as on a GPU, and the
                     emulator of tests/emulation does it. Too slow for all but small shapes.
"""

from libraries import build_libraries
from package import build_computing_operators, build_package

if __name__ == "__main__":
    build_libraries()
    build_package()
    build_computing_operators()
