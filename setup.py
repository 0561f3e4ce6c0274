# SPDX-License-Identifier: Apache-2.0
"""Builds the two extension modules; everything else about the package is in pyproject.toml.

Where nvcc is found, the CUDA kernels are part of the operators: csrc/tools/nvcc.py.
"""

import json
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "tools"))

import nvcc  # noqa: E402

# The oldest torch the operators load on. They use only torch's stable C ABI as of that release, so
# one build serves every later one.
TORCH_TARGET = (2, 10)
TORCH_TARGET_HEX = "0x{:02x}{:02x}".format(*TORCH_TARGET) + 12 * "0"

OPS_SOURCES = [
    "csrc/assign_classes.cpp",
    "csrc/head_pages.cpp",
    "csrc/key_moments.cpp",
    "csrc/key_scores.cpp",
    "csrc/merge_compact.cpp",
    "csrc/shift_block_tables.cpp",
    "csrc/rank_entries.cpp",
    "csrc/record_queries.cpp",
    "csrc/score_queries.cpp",
    "csrc/score_window.cpp",
    "csrc/select_entries.cpp",
    "csrc/vector_norms.cpp",
    "csrc/torch_bindings.cpp",
    "csrc/cpu/assign_classes.cpp",
    "csrc/cpu/head_pages.cpp",
    "csrc/cpu/key_moments.cpp",
    "csrc/cpu/key_scores.cpp",
    "csrc/cpu/merge_compact.cpp",
    "csrc/cpu/shift_block_tables.cpp",
    "csrc/cpu/rank_entries.cpp",
    "csrc/cpu/record_queries.cpp",
    "csrc/cpu/score_queries.cpp",
    "csrc/cpu/score_window.cpp",
    "csrc/cpu/select_entries.cpp",
    "csrc/cpu/vector_norms.cpp",
    "csrc/cpu/simd.cpp",
    "csrc/cpu/simd_avx2.cpp",
    "csrc/cpu/simd_avx512.cpp",
    "csrc/cpu/simd_avx512_bf16.cpp",
    "csrc/cpu/simd_amx.cpp",
    "csrc/cpu/simd_portable.cpp",
]
# Only where there is nvcc.
CUDA_HOST_SOURCES = ["csrc/cuda/stream.cpp"]
CUDA_SOURCES = [
    "csrc/cuda/assign_classes.cu",
    "csrc/cuda/head_pages.cu",
    "csrc/cuda/key_moments.cu",
    "csrc/cuda/key_scores.cu",
    "csrc/cuda/merge_compact.cu",
    "csrc/cuda/shift_block_tables.cu",
    "csrc/cuda/rank_entries.cu",
    "csrc/cuda/record_queries.cu",
    "csrc/cuda/score_queries.cu",
    "csrc/cuda/score_window.cu",
    "csrc/cuda/select_entries.cu",
    "csrc/cuda/vector_norms.cu",
]

COMPILE_ARGS = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-fvisibility=hidden",
]
LINK_ARGS = ["-Wl,--as-needed", "-s"] if sys.platform == "linux" else []
# Absolute, because ninja compiles from within build/.
INCLUDE_DIRS = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include")]
# What makes an extension stale besides its sources.
DEPENDS = ["setup.py", "ems_vllm/_version.py"] + [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob("csrc/**/*"))
    if path.suffix in {".h", ".inl", ".cuh", ".cu", ".py"} or str(path).endswith("stream.cpp")
]


def version() -> str:
    namespace: dict[str, str] = {}
    exec((ROOT / "ems_vllm" / "_version.py").read_text(), namespace)
    return namespace["__version__"]


class Build(BuildExtension):
    """Compiles the CUDA kernels first, where it can.

    Keeps object files in build/, also for `pip install -e .`, which would use a new temporary
    directory every time and compile everything again.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.build_temp = str(ROOT / "build" / f"temp.{tag}")

    def build_extensions(self) -> None:
        toolkit = nvcc.find_toolkit()
        archs = nvcc.requested_archs() if toolkit else ()
        bindings, operators = self.extensions
        if toolkit is None:
            print("ems_vllm: without CUDA kernels")
        else:
            print(f"ems_vllm: CUDA {toolkit.version} kernels for {', '.join(archs)}", flush=True)
            bindings.define_macros += [
                ("EMS_CUDA_ARCHS", f'"{" ".join(archs)}"'),
                ("EMS_CUDA_COMPILER", f'"nvcc {toolkit.version}"'),
            ]
            sources = [ROOT / source for source in CUDA_SOURCES]
            folder = Path(self.build_temp) / "cuda"
            objects = nvcc.compile_sources(toolkit, archs, sources, INCLUDE_DIRS, folder)
            operators.sources += CUDA_HOST_SOURCES
            operators.define_macros.append(("EMS_WITH_CUDA", "1"))
            operators.extra_objects += [*map(str, objects), str(toolkit.static_runtime())]
            # Nothing of the CUDA runtime shows, so that it cannot get in the way of torch's own.
            operators.extra_link_args += ["-Wl,--exclude-libs,ALL", "-ldl", "-lpthread", "-lrt"]
            operators.depends += map(str, objects)
        stamp = self._stamp({"cuda": toolkit.version if toolkit else None, "archs": archs})
        for extension in self.extensions:
            extension.depends.append(stamp)
        super().build_extensions()

    def _stamp(self, settings: dict[str, object]) -> str:
        """A file that is newer than an extension built with other settings."""
        path = Path(self.build_temp) / "settings.json"
        text = json.dumps(settings)
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)


setup(
    ext_modules=[
        Extension(
            "ems_vllm._C",
            sources=["csrc/python_bindings.cpp"],
            include_dirs=[*INCLUDE_DIRS, pybind11.get_include()],
            define_macros=[
                ("EMS_VERSION", f'"{version()}"'),
                ("EMS_TORCH_TARGET", f'"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"'),
            ],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=[*LINK_ARGS],
            depends=[*DEPENDS],
            language="c++",
        ),
        # Not a Python module: torch.ops.load_library() loads it.
        Extension(
            "ems_vllm._ops",
            sources=[*OPS_SOURCES],
            include_dirs=[*INCLUDE_DIRS, *include_paths()],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_HEX)],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=[*LINK_ARGS],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            depends=[*DEPENDS],
            language="c++",
            py_limited_api=True,
        ),
    ],
    cmdclass={"build_ext": Build},
)
