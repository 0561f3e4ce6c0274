# SPDX-License-Identifier: Apache-2.0
"""Builds this package for a null GPU, whose runtime is not the one that the package has in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from paths import BUILD, COMPUTING_SITE, CUDA, HERE, LIB, ROOT, SITE, environment, site_packages


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
    # Each Python has a folder of its own; any will do.
    folder = max(ROOT.glob("build/temp.*"), key=lambda path: path.stat().st_mtime, default=ROOT)
    objects = [path for path in folder.glob("*/**/*.o") if path.name != "python_bindings.o"]
    if not any(path.parent.name == "cuda" and path.stem == "score_queries" for path in objects):
        raise SystemExit(
            "there are no objects of the CUDA kernels: install nvcc, and `make kernels`"
        )
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
    sources += [*ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc" / "cuda" / "stream.cpp"]
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
