# SPDX-License-Identifier: Apache-2.0
"""Builds a null GPU, and this package for it: `python tests/nullgpu/build.py`, from the environment
that `make test-nullgpu` makes.

Into build/nullgpu/:
    lib/     CUDA's libraries. The runtime, the driver, NVML and what torch calls of cuBLAS and NCCL
             are written by hand (device/); of the others every function that torch or vLLM wants
             is there and does nothing, so none of NVIDIA's wheels is needed.
    site/    A copy of ems_vllm whose operators are the objects that `make build` compiled, linked
             with that runtime: the package's own has CUDA's in it.
    site-computing/
             Another whose kernels compute: they are work of a stream as on a GPU, and the
             emulator of tests/emulation does it. Too slow for all but small shapes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "nullgpu"
LIB = BUILD / "lib"
SITE = BUILD / "site"
COMPUTING_SITE = BUILD / "site-computing"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

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


def site_packages() -> Path:
    """Where torch and vLLM of this environment lie."""
    return Path(sysconfig.get_paths()["purelib"])


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


def compile_library(name: str, sources: Sequence[Path], *options: str) -> None:
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
    # A library with several gives each function its own; the first also takes what is by hand.
    lines = []
    for index, version in enumerate(versions):
        names = [symbol for symbol, wanted in symbols.items() if wanted == version]
        members = ["*"] if len(versions) == 1 else names
        lines.append(f"{version} {{ global: {'; '.join(members)}; }};")
        if index == 0 and len(versions) > 1:
            lines[-1] = f"{version} {{ global: {'; '.join([*names, 'nullgpu_*'])}; }};"
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
    # The driver is looked up by the runtime, and the other way round.
    for name in sorted(names, key=lambda name: name not in BY_HAND):
        symbols = wanted.get(name, {})
        source = BY_HAND.get(name)
        missing = sorted(set(symbols) - by_hand)
        if name in ("libcudart.so.13", "libcuda.so.1") and missing:
            raise SystemExit(f"the null GPU lacks of {name}: {', '.join(missing)}")
        rest = LIB / f"{name}.c"
        rest.write_text("".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in missing))
        objects = [rest] if source is None else [HERE / "device" / source, rest]
        compile_library(
            name, ["-xc++", *objects[:-1], "-xc", rest], "-l:libnullgpu.so",
            *version_script(name, symbols),
        )  # fmt: skip
    (LIB / "libcuda.so").symlink_to("libcuda.so.1")
    # torchvision brings a runtime of its own, and vLLM takes the first one that it finds loaded.
    for path in site_packages().glob("*.libs/libcudart*"):
        path.unlink()
        path.symlink_to(LIB / "libcudart.so.13")
    print(f"null GPU: {len(names)} libraries of CUDA in {LIB.relative_to(ROOT)}")


def build_package() -> None:
    """site/, anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "ems_vllm", SITE / "ems_vllm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    link_operators(SITE / "ems_vllm")
    compile_bindings(SITE / "ems_vllm")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(SITE)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment())
    print(f"null GPU: ems_vllm in {SITE.relative_to(ROOT)}")


def link_operators(package: Path) -> None:
    """_ops.abi3.so from the objects of the last build, with the null GPU's runtime."""
    objects = [
        path for path in ROOT.glob("build/temp.*/**/*.o") if path.name != "python_bindings.o"
    ]
    if not any(path.parent.name == "cuda" and path.stem == "score_queries" for path in objects):
        raise SystemExit("there are no objects of the CUDA kernels: install nvcc, and `make build`")
    torch = site_packages() / "torch" / "lib"
    command = ["g++", "-shared", "-s", "-o", str(package / "_ops.abi3.so"), *map(str, objects)]
    subprocess.run(
        [*command, f"-L{torch}", f"-L{LIB}", "-ltorch_cpu", "-l:libcudart.so.13", "-ldl"],
        check=True,
    )


def build_computing_operators() -> None:
    """site-computing/, from what is compiled in computing/."""
    folder = BUILD / "computing"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in ROOT.glob("csrc/*.cpp") if path.name != "python_bindings.cpp"]
    sources += [*ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc" / "cuda" / "queue.cpp"]
    sources += [*ROOT.glob("csrc/cuda/*.cu")]
    emulation = ROOT / "tests" / "emulation"
    sources += [path for path in emulation.glob("*.cpp") if path.name != "faults.cpp"]
    torch = site_packages() / "torch"
    includes = [
        # What this folder has wins over the emulator, and that one over the package.
        *(HERE / "include", HERE / "device", emulation / "include"),
        *(ROOT / "csrc", ROOT / "csrc" / "include"),
        *(torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"),
        CUDA / "include",
    ]
    flags = ["-fPIC", "-O2", "-std=c++20", "-fvisibility=hidden", "-w", "-DEMS_WITH_CUDA=1"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in includes)]
    rules = ["rule cxx", f"  command = g++ {' '.join(flags)} -MD -MF $out.d -c -xc++ $in -o $out"]
    rules += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sources:
        objects.append(f"{source.parent.name}_{source.stem}.o")
        rules.append(f"build {objects[-1]}: cxx {source}")
    library = f"-L{torch / 'lib'} -L{LIB} -ltorch_cpu -l:libnullgpu.so -ldl"
    rules += ["rule link", f"  command = g++ -shared -s -o $out $in {library}"]
    rules += [f"build _ops.abi3.so: link {' '.join(objects)}", ""]
    (folder / "build.ninja").write_text("\n".join(rules))
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    shutil.rmtree(COMPUTING_SITE, ignore_errors=True)
    shutil.copytree(SITE, COMPUTING_SITE)
    shutil.copy(folder / "_ops.abi3.so", COMPUTING_SITE / "ems_vllm")
    print(f"null GPU: ems_vllm that computes in {COMPUTING_SITE.relative_to(ROOT)}")


def compile_bindings(package: Path) -> None:
    """_C for this Python, saying what the package's own says of its kernels."""
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    version = re.search(
        r'^__version__ = "(.*)"', (ROOT / "ems_vllm" / "_version.py").read_text(), re.M
    )
    assert version is not None
    macros = {
        "EMS_VERSION": version[1],
        "EMS_TORCH_TARGET": "2.10",
        "EMS_CUDA_ARCHS": "8.0 9.0a",
        "EMS_CUDA_COMPILER": "nvcc",
    }
    includes = [ROOT / "csrc", ROOT / "csrc" / "include", pybind11.get_include()]
    includes.append(sysconfig.get_paths()["include"])
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-fvisibility=hidden"]
    command += [f"-I{path}" for path in includes]
    command += [f'-D{name}="{value}"' for name, value in macros.items()]
    source = ROOT / "csrc" / "python_bindings.cpp"
    subprocess.run([*command, "-o", str(package / f"_C{suffix}"), str(source)], check=True)


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


if __name__ == "__main__":
    build_libraries()
    build_package()
    build_computing_operators()
