# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels use, as their compiler told while they were built.

Usage: python csrc/tools/kernel_report.py [--logs FOLDER] [--all]

One line for every instance of a kernel and architecture. Dynamic shared memory is not in it: a
launch decides that. Fails when an instance for 16-bit elements, or for any, keeps values in local
memory: spilled registers, or an array that is not indexed by constants.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Serving is in 16 bits; float32 is for tests, and its tiles are larger than registers allow.
COLD_ELEMENT = "float"
# What one kernel of one architecture is described by, in the order of ptxas.
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel in machine code of one architecture.

    Attributes:
        symbol: Mangled name.
        arch: As in sm_90a, without "sm_".
        shared_bytes: Static shared memory.
        stack_bytes: Local memory per thread, what is spilled included.
        spill_bytes: Stored and loaded, per thread.
    """

    symbol: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        return self.stack_bytes > 0 or self.spill_bytes > 0


@dataclass(frozen=True)
class Name:
    """A kernel's name as its source has it."""

    function: str
    arguments: str

    @property
    def is_hot(self) -> bool:
        return not re.search(rf"\b{COLD_ELEMENT}\b", self.arguments)


def parse(log: str) -> Iterator[Kernel]:
    """The kernels of one log of `nvcc -Xptxas -v`."""
    for part in log.split("Compiling entry function")[1:]:
        entry = _ENTRY.search("Compiling entry function" + part)
        frame, used, shared = _FRAME.search(part), _USED.search(part), _SHARED.search(part)
        if entry is None or frame is None or used is None:
            raise ValueError(f"not a log of ptxas: {part[:200]!r}")
        stack, stores, loads = (int(value) for value in frame.groups())
        yield Kernel(
            symbol=entry[1],
            arch=entry[2],
            registers=int(used[1]),
            shared_bytes=int(shared[1]) if shared else 0,
            stack_bytes=stack,
            spill_bytes=stores + loads,
        )


def demangle(symbols: list[str]) -> list[Name]:
    """Names of mangled symbols, in their order, without namespaces and parameters."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = []
    for line in done.stdout.splitlines():
        text = line.removeprefix("void ").replace("ems::", "")
        match = re.match(r"(\w+)(?:<(.*?)>)?\(", text)
        names.append(Name(match[1], match[2] or "") if match else Name(line, ""))
    return names


def read(folder: Path) -> list[tuple[Name, Kernel]]:
    """Every kernel of the logs in a folder, by name and architecture."""
    kernels = [kernel for log in sorted(folder.glob("*.log")) for kernel in parse(log.read_text())]
    names = demangle([kernel.symbol for kernel in kernels])
    return sorted(
        zip(names, kernels, strict=True),
        key=lambda row: (row[0].function, row[1].arch, row[0].arguments),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=Path, help="folder of the logs; the last build's by default")
    parser.add_argument("--problems", action="store_true", help="list only local memory")
    options = parser.parse_args()
    folders = [options.logs] if options.logs else sorted(ROOT.glob("build/temp.*/cuda"))
    rows = [row for folder in folders for row in read(folder)]
    if not rows:
        print("No CUDA kernels have been built here.")
        return 1
    row_format = "{:32} {:14} {:>5} {:>9} {:>8} {:>7} {:>7}"
    header = ("kernel", "arguments", "sm", "registers", "shared B", "local B", "spill B")
    print(row_format.format(*header))
    problems = 0
    for name, kernel in rows:
        bad = name.is_hot and kernel.uses_local_memory
        problems += bad
        if options.problems and not kernel.uses_local_memory:
            continue
        line = row_format.format(
            name.function,
            name.arguments,
            kernel.arch,
            kernel.registers,
            kernel.shared_bytes,
            kernel.stack_bytes,
            kernel.spill_bytes,
        )
        print(f"{line}  local memory" if bad else line)
    archs = ", ".join(f"sm_{arch}" for arch in sorted({kernel.arch for _, kernel in rows}))
    print(f"{len(rows)} kernels for {archs}; {problems} that serving runs use local memory")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
