# SPDX-License-Identifier: Apache-2.0
"""Builds CUDA's libraries of a null GPU.

The runtime, the driver, NVML and what torch calls of cuBLAS and NCCL are written by hand (device/).
Of the others every function that torch or vLLM wants is there and does nothing, so none of NVIDIA's
packages is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from paths import CUDA, HERE, LIB, ROOT, site_packages

# Source in device/ of each library that is written by hand, in part or as a whole.
BY_HAND = {
    "libcudart.so.13": "cudart.cpp",
    "libcuda.so.1": "driver.cpp",
    "libnvidia-ml.so.1": "nvml.cpp",
    "libcublas.so.13": "cublas.cpp",
    "libcublasLt.so.13": "cublaslt.cpp",
    "libnccl.so.2": "nccl.cpp",
}
MODEL = ("devices.cpp", "memory.cpp", "streams.cpp", "kernels.cpp", "trace.cpp")
# Libraries that are asked for by name, without being linked.
ALSO = ("libcupti.so.13", "libnvrtc.so.13", "libnvshmem_host.so.3")
# A symbol without a version belongs to the library of its prefix; the longest is tried first.
PREFIXES = {
    "cublasLt": "libcublasLt.so.13",
    "cublas": "libcublas.so.13",
    "cudnn": "libcudnn.so.9",
    "cuFile": "libcufile.so.0",
    "cufft": "libcufft.so.12",
    "cupti": "libcupti.so.13",
    "curand": "libcurand.so.10",
    "cusolver": "libcusolver.so.12",
    "cusparseLt": "libcusparseLt.so.0",
    "cusparse": "libcusparse.so.12",
    "nccl": "libnccl.so.2",
    "pnccl": "libnccl.so.2",
    "nvrtc": "libnvrtc.so.13",
    "nvshmem": "libnvshmem_host.so.3",
    "nvshmemx": "libnvshmem_host.so.3",
}
_SYMBOL = re.compile(rf"({'|'.join(PREFIXES)}|__cuda|cuda|cu)[iA-Z_0-9]")


def compiled_parts() -> list[Path]:
    """The libraries of torch and vLLM, which say what they want of CUDA."""
    site = site_packages()
    return [*site.glob("torch/lib/*.so"), *site.glob("vllm/**/*.so")]


def wanted_symbols(libraries: Iterable[Path]) -> dict[str, dict[str, str]]:
    """By library: its functions that are called, each with its symbol version or ""."""
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for line in listed.splitlines():
        symbol = line.split()[-1] if line.split() else ""
        name, _, version = symbol.partition("@")
        if not _SYMBOL.match(name):
            continue
        owners = [
            library
            for prefix, library in sorted(PREFIXES.items(), key=lambda item: -len(item[0]))
            if name.startswith(prefix)
        ]
        if version.startswith("lib"):
            owners = [version]
        elif not owners:
            owners = ["libcudart.so.13" if "cuda" in name else "libcuda.so.1"]
        if version or name not in found[owners[0]]:
            found[owners[0]][name] = version
    return found


def defined(source: str) -> set[str]:
    """Functions that a source defines, as far as a line begins with them."""
    text = (HERE / "device" / source).read_text()
    return set(re.findall(r"^[\w: *]*?\b(\w+)\([^;]*?\)\s*\{", text, re.M))


def compile_library(name: str, sources: Sequence[Path | str], *options: str) -> None:
    """One shared library in lib/."""
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-w", f"-Wl,-soname,{name}"]
    paths = [f"-I{CUDA}/include", f"-I{HERE / 'device'}", f"-L{LIB}", "-Wl,-rpath,$ORIGIN"]
    subprocess.run(
        [*command, *paths, "-o", str(LIB / name), *map(str, sources), *options, "-ldl"], check=True
    )


def version_script(name: str, symbols: dict[str, str]) -> list[str]:
    """The linker's option that gives symbols the versions under which they are called."""
    versions = sorted({version for version in symbols.values() if version})
    if not versions:
        return []
    by_version = {
        version: [symbol for symbol, wanted in symbols.items() if wanted == version]
        for version in versions
    }
    # What nobody asks for by a version gets the first.
    by_version[versions[0]].append("*")
    lines = [f"{version} {{ global: {'; '.join(by_version[version])}; }};" for version in versions]
    path = LIB / f"{name}.map"
    path.write_text("\n".join(lines))
    return [f"-Wl,--version-script={path}"]


def build_libraries() -> None:
    """lib/, anew."""
    shutil.rmtree(LIB, ignore_errors=True)
    LIB.mkdir(parents=True)
    wanted = wanted_symbols(compiled_parts())
    compile_library("libnullgpu.so", [HERE / "device" / name for name in MODEL])
    by_hand = {symbol for source in BY_HAND.values() for symbol in defined(source)}
    names = sorted({*wanted, *BY_HAND, *ALSO, *PREFIXES.values()})
    for name in names:
        symbols = wanted.get(name, {})
        source = BY_HAND.get(name)
        missing = sorted(set(symbols) - by_hand)
        if name in ("libcudart.so.13", "libcuda.so.1") and missing:
            raise SystemExit(f"the null GPU lacks of {name}: {', '.join(missing)}")
        rest = LIB / f"{name}.c"
        rest.write_text("".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in missing))
        written = [] if source is None else ["-xc++", HERE / "device" / source]
        options = ["-l:libnullgpu.so", *version_script(name, symbols)]
        compile_library(name, [*written, "-xc", rest], *options)
    (LIB / "libcuda.so").symlink_to("libcuda.so.1")
    # torchvision brings a runtime of its own, and vLLM takes the first one that it finds loaded.
    for path in site_packages().glob("*.libs/libcudart*"):
        path.unlink()
        path.symlink_to(LIB / "libcudart.so.13")
    print(f"null GPU: {len(names)} libraries of CUDA in {LIB.relative_to(ROOT)}")
