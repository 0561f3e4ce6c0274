# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources with nvcc; setup.py links the objects into the library of the operators.

torch's CUDAExtension does the same, but only beside a torch built for the same CUDA. The operators
need nothing of torch's CUDA part, so a CPU build of torch is enough here.

Environment:
    EMS_CUDA: 0 leaves the CUDA kernels out, 1 demands them; unset, they are built where nvcc is.
    CUDA_HOME: Where nvcc is, if it is not on the path.
    TORCH_CUDA_ARCH_LIST: GPU architectures in torch's notation, as "8.0 9.0a+PTX".
    MAX_JOBS: Compilations at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# The architecture that some kernels have a variant of their own for.
HOPPER = "9.0a"
DEFAULT_ARCHS = ("8.0", HOPPER)
# Asynchronous copies and bfloat16 on tensor cores begin here.
OLDEST_ARCH = (8, 0)
FLAGS = [
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter",
    # Registers, spills and local memory of every kernel; kernel_report.py reads them.
    "-Xptxas=-v",
]


class BuildError(RuntimeError):
    """The CUDA kernels cannot be built as asked."""


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA compiler.

    Attributes:
        root: Folder that holds CUDA's headers and libraries.
        version: Release of the compiler, as "13.0.88".
    """

    nvcc: str
    root: Path
    version: str

    def static_runtime(self) -> Path:
        """The CUDA runtime to link in, so that the library loads where there is none.

        Raises:
            BuildError: the toolkit came without it.
        """
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            path = self.root / folder / "libcudart_static.a"
            if path.is_file():
                return path
        raise BuildError(
            f"{self.root} has no libcudart_static.a: install CUDA's cudart development package, "
            "or set EMS_CUDA=0 to build without CUDA kernels"
        )


def find_toolkit() -> Toolkit | None:
    """The compiler to use; None for a build without CUDA kernels."""
    wanted = os.environ.get("EMS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"EMS_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = home / "bin" / "nvcc" if "CUDA_HOME" in os.environ else shutil.which("nvcc")
    nvcc = nvcc or home / "bin" / "nvcc"
    if not Path(nvcc).is_file():
        if wanted == "1":
            raise BuildError(f"EMS_CUDA=1, but there is no nvcc on the path nor at {nvcc}")
        return None
    version = re.search(r"release .*, V([\d.]+)", _output([str(nvcc), "--version"]))
    # nvcc may be a script or a link, so it is asked where its toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", _output([str(nvcc), "--dryrun", "-c", "x.cu"]), re.M)
    if version is None or top is None:
        raise BuildError(f"{nvcc} does not answer as CUDA's compiler does")
    return Toolkit(str(nvcc), Path(top[1]).resolve(), version[1])


def requested_archs() -> tuple[str, ...]:
    """Architectures to compile for, in torch's notation, each once.

    9.0 is never among them: its machine code would run on the same GPUs as that of 9.0a, without
    the kernels that 9.0a alone has. 9.0+PTX, for the PTX alone, comes with 9.0a.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST cannot be read, or names no GPU that the kernels run on.
    """
    # Whether with PTX.
    archs: dict[str, bool] = {}
    for arch in re.split(r"[\s;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()):
        if not arch:
            continue
        match = re.fullmatch(r"((\d+)\.(\d)[af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must hold compute capabilities as 8.0 or 9.0a+PTX, "
                f"got {arch!r}"
            )
        name, with_ptx = match[1], match[4] is not None
        if (int(match[2]), int(match[3])) < OLDEST_ARCH:
            print(f"ems_vllm: no kernels for {arch}, which is older than {OLDEST_ARCH}")
            continue
        if name == "9.0":
            if HOPPER not in archs:
                print(f"ems_vllm: machine code for {HOPPER} in place of 9.0, for the same GPUs")
                archs[HOPPER] = False
            if not with_ptx:
                continue
        archs[name] = archs.get(name, False) or with_ptx
    if not archs and os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        raise BuildError("TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on")
    return tuple(f"{name}+PTX" if ptx else name for name, ptx in archs.items()) or DEFAULT_ARCHS


def gencode(archs: Sequence[str]) -> list[str]:
    """What nvcc is told: machine code of each architecture, with +PTX what drivers compile too."""
    flags = []
    for arch in archs:
        number, _, ptx = arch.replace(".", "").partition("+")
        codes = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        if arch == "9.0+PTX":
            # For later GPUs only; see requested_archs.
            codes = f"compute_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={codes}")
    return flags


def compile_sources(
    toolkit: Toolkit,
    archs: Sequence[str],
    sources: Sequence[Path],
    include_dirs: Sequence[str],
    folder: Path,
) -> list[Path]:
    """Object files of the sources; compiles in parallel, and only what changed.

    Args:
        folder: Where objects go, each with what the compiler said of it in a `.log` beside it.
    Raises:
        BuildError: the compiler refused a source; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = os.environ.get("CXX")
    flags = [
        *FLAGS,
        *gencode(archs),
        # Kernels that exist for this architecture alone are chosen only where they were built.
        *(["-DEMS_HAS_SM90A=1"] if HOPPER in (arch.partition("+")[0] for arch in archs) else []),
        *(f"-I{path}" for path in include_dirs),
        *([f"-ccbin={shlex.split(host)[0]}"] if host else []),
    ]
    objects = [folder / f"{source.stem}.o" for source in sources]
    (folder / "build.ninja").write_text("\n".join(_rules(toolkit, flags, sources, objects)))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([*_ninja(), "-C", str(folder), *jobs]).returncode != 0:
        raise BuildError("nvcc failed; its messages are above")
    for log in (path.with_suffix(".log") for path in objects):
        sys.stdout.writelines(line for line in log.open() if "warning" in line)
    return objects


def _rules(
    toolkit: Toolkit, flags: Sequence[str], sources: Sequence[Path], objects: Sequence[Path]
) -> Iterator[str]:
    command = f"{shlex.quote(toolkit.nvcc)} {shlex.join(flags)} -MD -MF $out.d -c $in -o $out"
    yield "rule nvcc"
    yield f"  command = {command} > $log 2>&1 || {{ cat $log; exit 1; }}"
    yield "  description = nvcc $in"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    for source, target in zip(sources, objects, strict=True):
        yield f"build {target.name}: nvcc {_escaped(source)}"
        yield f"  log = {target.with_suffix('.log').name}"
    yield ""


def _escaped(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def _ninja() -> list[str]:
    """The ninja that is installed beside this Python, which need not be on the path."""
    if subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True).returncode:
        return ["ninja"]
    return [sys.executable, "-m", "ninja"]


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr
