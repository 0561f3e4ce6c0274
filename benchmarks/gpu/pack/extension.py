# SPDX-License-Identifier: Apache-2.0
"""Builds the extension for a GPU machine with Hopper and another Python, and packs it.

Usage: python benchmarks/gpu/pack/extension.py OUT.tar.xz --headers-of python3.12

The operators have nothing of a Python version in them, and of torch its stable ABI alone, so any
Python with torch builds them. The module `_C` takes headers of the Python that it is for, no torch.
Both are built in a copy, build/gpu-prebuilt/, so that the checkout's own stay; what is there from
the last time is not compiled again. The operators are built once more with each patch of variants/,
for time_variants.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import setuptools  # noqa: F401 (puts its distutils in place)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distutils.core import run_setup

from gpu.prebuilt import DESCRIPTION, Built, digest

ROOT = Path(__file__).resolve().parents[3]
ARCHS = "9.0a"
COPY = ROOT / "build" / "gpu-prebuilt"
PATCHES = ROOT / "benchmarks" / "gpu" / "variants"
BUILT_VARIANTS = COPY / "variants"
_COPIED_FOLDERS = ("csrc", "ems_vllm", "configs", "models/text")
_COPIED_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
_ASK_PYTHON = """
import json, sysconfig
print(json.dumps([sysconfig.get_paths()["include"], sysconfig.get_config_var("EXT_SUFFIX")]))
"""


def ask_python(python: str) -> tuple[str, str]:
    """Another Python's folder of headers, and the ending of its modules.

    Raises:
        OSError, subprocess.CalledProcessError: it does not run.
    """
    asked = subprocess.run([python, "-c", _ASK_PYTHON], check=True, stdout=subprocess.PIPE)
    include, suffix = json.loads(asked.stdout)
    return include, suffix


def copy_sources() -> None:
    """The checkout into COPY; files keep their times, so that only what changed is compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in _COPIED_FOLDERS:
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, symlinks=True, ignore=ignored)
    for name in _COPIED_FILES:
        shutil.copy2(ROOT / name, COPY / name)


def build_operators() -> Path:
    """The library of operators, with kernels for ARCHS and with the package's egg-info.

    Raises:
        subprocess.CalledProcessError: setup.py failed; it has said why.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "egg_info"]
    env = os.environ | {"EMS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHS}
    subprocess.run(command, cwd=COPY, env=env, check=True)
    (library,) = (COPY / "ems_vllm").glob("_ops*.so")
    return library


def apply(patch: Path, root: Path) -> list[Path]:
    """Change the files in a copy of the sources as a patch says; which they are.

    Raises:
        subprocess.CalledProcessError: the patch is for other sources.
    """
    # git would look for the files in the repository that a copy lies in.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=root, env=env, check=True)
    named = subprocess.run(
        ["git", "apply", "--numstat", str(patch)],
        cwd=root,
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [root / line.split("\t")[2] for line in named.stdout.splitlines()]


def variants_are_built() -> bool:
    """Whether libraries of just these patches are there."""
    wanted, built = (
        {path.name: path.read_bytes() for path in folder.glob("*.patch")}
        for folder in (PATCHES, BUILT_VARIANTS)
    )
    return wanted == built


def build_variants() -> None:
    """A library with each patch; the sources are as before then, and newer than their objects."""
    shutil.rmtree(BUILT_VARIANTS, ignore_errors=True)
    BUILT_VARIANTS.mkdir()
    for patch in sorted(PATCHES.glob("*.patch")):
        changed = apply(patch, COPY)
        shutil.copy2(build_operators(), BUILT_VARIANTS / f"{patch.stem}.so")
        copy_sources()
        for path in changed:
            path.touch()
        shutil.copy2(patch, BUILT_VARIANTS)


def nvcc_version() -> str | None:
    """Release of the CUDA compiler that setup.py takes, as "13.0.88"; None where there is none."""
    toolkit = runpy.run_path(str(ROOT / "csrc" / "tools" / "nvcc.py"))["find_toolkit"]()
    return toolkit.version if toolkit else None


def build_module(include: str, suffix: str) -> Path:
    """The module `_C` for the Python with these headers.

    Raises:
        subprocess.CalledProcessError: the compiler failed; it has said why.
    """
    with contextlib.chdir(COPY):
        bindings = run_setup("setup.py", stop_after="init").ext_modules[0]
    # setup.py adds these while it builds.
    macros = [
        *bindings.define_macros,
        ("EMS_CUDA_ARCHS", f'"{ARCHS}"'),
        ("EMS_CUDA_COMPILER", f'"nvcc {nvcc_version()}"'),
    ]
    module = COPY / "ems_vllm" / f"_C{suffix}"
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", *bindings.extra_compile_args]
    command += [f"-I{folder}" for folder in [*bindings.include_dirs, include]]
    command += [f"-D{name}={value}" for name, value in macros]
    command += [*bindings.sources, "-o", str(module), *bindings.extra_link_args]
    subprocess.run(command, cwd=COPY, check=True)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--headers-of", default="python3.12", help="a Python as on the machine")
    options = parser.parse_args()
    try:
        include, suffix = ask_python(options.headers_of)
    except (OSError, subprocess.CalledProcessError):
        print(f"{options.headers_of} does not run: name a Python as on the GPU machine")
        return 1
    if nvcc_version() is None:
        print("there is no nvcc: set CUDA_HOME to where it is")
        return 1
    COPY.mkdir(parents=True, exist_ok=True)
    copy_sources()
    built = Built(digest(COPY), ARCHS, suffix)
    if options.out.is_file() and Built.read(COPY) == built and variants_are_built():
        print("extension: as packed before")
        return 0
    (COPY / DESCRIPTION).unlink(missing_ok=True)
    build_variants()
    files = [build_operators(), build_module(include, suffix)]
    report = [sys.executable, "csrc/tools/kernel_report.py"]
    subprocess.run(report, cwd=COPY, check=True, stdout=subprocess.DEVNULL)
    built.write(COPY)
    with tarfile.open(options.out, "w:xz", preset=9) as tar:
        for path in [*files, COPY / "ems_vllm.egg-info", COPY / DESCRIPTION]:
            tar.add(path, path.name)
        for log in sorted(COPY.glob("build/temp.*/cuda/*.log")):
            tar.add(log, f"logs/{log.name}")
        for library in sorted(BUILT_VARIANTS.glob("*.so")):
            tar.add(library, f"variants/{library.name}")
    print(f"the extension for {ARCHS} and {suffix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
