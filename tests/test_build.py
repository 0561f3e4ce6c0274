# SPDX-License-Identifier: Apache-2.0
"""What is inside the library of the operators: which GPUs it serves, and what it asks of others."""

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ems_vllm
from ems_vllm.engine.worker.memory import _MAX_SHARED_MEMBERS, KERNEL_SCRATCH_BYTES

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(ems_vllm.__file__).parent / "_ops.abi3.so"
sys.path.insert(0, str(ROOT / "csrc" / "tools"))

import kernel_report  # noqa: E402
import nvcc  # noqa: E402

ARCHS = ems_vllm.build_info()["cuda_archs"]
with_cuda = pytest.mark.skipif(not ARCHS, reason="built without CUDA kernels")


def undefined_symbols() -> list[tuple[str, str]]:
    """(name, version) of every symbol that the library wants from others."""
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--with-symbol-versions", LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [line.split()[-1].partition("@") for line in done.stdout.splitlines()]
    return [(name, version.lstrip("@")) for name, _, version in found]


def test_only_the_stable_abi_of_torch_is_used():
    """Or the library would not load on every torch from 2.10 on. nm is part of any compiler."""
    symbols = undefined_symbols()
    assert any(name.startswith("aoti_torch_") for name, _ in symbols)
    # Weak, and resolved by the C runtime.
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    foreign = [
        name
        for name, version in symbols
        if not name.startswith(("aoti_torch_", "torch_"))
        and not version.startswith(("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_"))
        and name not in weak
    ]
    assert foreign == []


def test_no_cuda_library_is_needed():
    done = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", done.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.match(r"libcuda|libnv|libtorch_cuda|libc10", name)]


def fat_binaries(data: bytes) -> Iterator[str]:
    """Architectures of the device code in a library, as nvcc names them: sm_90a, compute_90."""
    for start in (
        match.start() for match in re.finditer(b"\x50\xed\x55\xba\x01\x00\x10\x00", data)
    ):
        (size,) = struct.unpack_from("<Q", data, start + 8)
        at = start + 16
        while at < start + 16 + size:
            kind, _, header, length = struct.unpack_from("<HHIQ", data, at)
            (number,) = struct.unpack_from("<I", data, at + 28)
            (flags,) = struct.unpack_from("<Q", data, at + 40)
            suffix = "f" if flags & 1 << 21 else "a" if flags & 1 << 20 else ""
            yield f"{'compute' if kind == 1 else 'sm'}_{number}{suffix}"
            at += header + length


@with_cuda
def test_device_code_is_there_for_every_architecture_asked_for():
    codes = " ".join(flag.partition(",code=")[2] for flag in nvcc.gencode(ARCHS))
    asked = set(re.findall(r"(?:sm|compute)_\w+", codes))
    assert set(fat_binaries(LIBRARY.read_bytes())) == asked


@with_cuda
def test_kernels_of_every_operator_are_there_and_keep_to_registers(capsys, monkeypatch):
    from ems_vllm import ops

    if not list(ROOT.glob("build/temp.*/cuda/*.log")):
        pytest.skip("built elsewhere")
    monkeypatch.setattr(sys, "argv", ["kernel_report.py"])
    status = kernel_report.main()
    report = capsys.readouterr().out
    launchers = "".join(path.read_text() for path in ROOT.glob("csrc/cuda/*.cu"))
    kernels = set(re.findall(r"\b(\w+_kernel)\b", launchers))
    built = re.findall(r"\bsm_(\w+)", " ".join(nvcc.gencode(ARCHS)))
    assert kernels
    for kernel in kernels:
        for number in built:
            assert re.search(rf"^{kernel} .* {number} ", report, re.M), (kernel, number)
    for op in ops.OPERATORS:
        assert (ROOT / "csrc" / "cuda" / f"{op}.cu").is_file()
    assert status == 0, "\n".join(line for line in report.splitlines() if "local memory" in line)


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3ems1fIfLi64EEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN3ems1fIfLi64EEEvv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compiling entry function '_ZN3ems1gEvv' for 'sm_90a'
ptxas info    : Function properties for _ZN3ems1gEvv
    {stack} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers
"""


@pytest.mark.parametrize("stack", [0, 8])
def test_report_of_a_log(tmp_path, capsys, monkeypatch, stack):
    (tmp_path / "x.log").write_text(LOG.format(stack=stack))
    assert list(kernel_report.parse(LOG.format(stack=stack))) == [
        kernel_report.Kernel("_ZN3ems1fIfLi64EEEvv", "80", 24, 512, 8, 16),
        kernel_report.Kernel("_ZN3ems1gEvv", "90a", 16, 0, stack, 0),
    ]
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--logs", str(tmp_path)])
    # The instance for float32 may spill, one for any element type may not.
    assert kernel_report.main() == (1 if stack else 0)
    assert "f                                float, 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "archs"),
    [
        ("", nvcc.DEFAULT_ARCHS),
        ("9.0a", ("9.0a",)),
        ("7.5;8.0 9.0a+PTX  10.0f", ("8.0", "9.0a+PTX", "10.0f")),
        ("8.0;8.0+PTX;8.0", ("8.0+PTX",)),
        # Never code for 9.0, which would leave out or hide the kernels for 9.0a.
        ("8.0 9.0 10.0", ("8.0", "9.0a", "10.0")),
        ("9.0;9.0a", ("9.0a",)),
        ("9.0a;9.0", ("9.0a",)),
        ("8.0 9.0+PTX", ("8.0", "9.0a", "9.0+PTX")),
        ("9.0+PTX 9.0a+PTX 9.0", ("9.0a+PTX", "9.0+PTX")),
    ],
)
def test_architectures_are_read_from_the_environment(monkeypatch, value, archs):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert nvcc.requested_archs() == archs


@pytest.mark.parametrize(
    ("value", "message"), [("Hopper", "got 'Hopper'"), ("7.5", "no architecture from 8.0 on")]
)
def test_wrong_architectures_are_refused(monkeypatch, value, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    with pytest.raises(nvcc.BuildError, match=message):
        nvcc.requested_archs()


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("9.0", ["ems_vllm: machine code for 9.0a in place of 9.0, for the same GPUs"]),
        ("9.0a 9.0", []),
    ],
)
def test_it_is_said_when_another_architecture_is_built(monkeypatch, capsys, value, lines):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    nvcc.requested_archs()
    assert capsys.readouterr().out.splitlines() == lines


def test_flags_of_architectures():
    assert nvcc.gencode(["8.0", "9.0a+PTX", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# Writes its arguments where the object belongs.
FAKE_NVCC = """#!/bin/sh
arguments="$*"
while [ "$1" != -o ]; do shift; done
echo "$arguments" > "$2"
"""


@pytest.mark.parametrize(
    ("archs", "has_hopper"),
    [
        (["8.0"], False),
        (["8.0", "9.0a"], True),
        (["9.0a+PTX"], True),
        (["9.0a", "9.0+PTX"], True),
        (["8.0", "10.0a"], False),
    ],
)
def test_kernels_for_hopper_are_chosen_where_they_are_built(tmp_path, archs, has_hopper):
    compiler = tmp_path / "nvcc"
    compiler.write_text(FAKE_NVCC)
    compiler.chmod(0o755)
    source = tmp_path / "kernel.cu"
    source.touch()
    toolkit = nvcc.Toolkit(str(compiler), tmp_path, "13.0")
    (target,) = nvcc.compile_sources(toolkit, archs, [source], [], tmp_path / "objects")
    arguments = target.read_text().split()
    assert ("-DEMS_HAS_SM90A=1" in arguments) == has_hopper
    assert set(nvcc.gencode(archs)) <= set(arguments)


def test_cuda_can_be_left_out(monkeypatch):
    monkeypatch.setenv("EMS_CUDA", "0")
    assert nvcc.find_toolkit() is None


def test_cuda_that_is_demanded_but_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("EMS_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(nvcc.BuildError, match="EMS_CUDA=1, but there is no nvcc"):
        nvcc.find_toolkit()
    monkeypatch.delenv("EMS_CUDA")
    assert nvcc.find_toolkit() is None


def test_engine_keeps_the_scratch_memory_of_kernels_free():
    source = (ROOT / "csrc" / "launchers.h").read_text()
    (limit,) = re.findall(r"kMaxScratchBytes = (\d+) << 20;", source)
    assert int(limit) << 20 == KERNEL_SCRATCH_BYTES
    source = (ROOT / "csrc" / "include" / "ems" / "merge_compact.cuh").read_text()
    (limit,) = re.findall(r"kMaxSharedMembers = (\d+);", source)
    assert int(limit) == _MAX_SHARED_MEMBERS
