# SPDX-License-Identifier: Apache-2.0
"""Instructions that a warp takes per tile in the loops of the kernels that multiply vectors.

Usage: python csrc/tools/instruction_report.py [--objects FOLDER] [--all]

A tile is one turn of a loop: of the one that multiplies, and on compute capability 9.0a of the one
that gathers beside it. Where a turn may branch, two lines show the path with the fewest
instructions and that with the most. A loop within (a wait that is tried again) counts once, a
function that is called (a division of 64 bits) not at all. --all lists every head size and dtype
for which tensor cores multiply, instead of bfloat16 and head size 128.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import kernel_report

ROOT = Path(__file__).resolve().parents[2]
# Where `make setup` puts Triton, which comes with the disassembler of the CUDA toolkit.
TRITON_BIN = ROOT / ".triton" / "triton" / "backends" / "nvidia" / "bin"
DEFAULT_ARGUMENTS = "BFloat16, 128"
# Every instruction is in the first class that names its operation, or in "other".
CLASSES = {
    "products": ("HMMA", "HGMMA"),
    "MUFU": ("MUFU",),
    "float": ("FFMA", "FADD", "FMUL"),
    "choice": ("FSETP", "FSEL", "FMNMX"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "global": ("LDG", "STG", "LDGSTS"),
}
_FUNCTION = re.compile(r"^\s+Function : (\w+)")
_ARCH = re.compile(r"^arch = sm_(\w+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([\w.]+)\s*(.*?)\s*;")


class ReportError(RuntimeError):
    """Instructions cannot be listed here."""


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; `operation` is without modifiers, as "LDG"."""

    address: int
    predicate: str
    operation: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch leads; None for anything else, calls included."""
        match = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(match[1], 16) if self.operation in ("BRA", "JMP") and match else None

    @property
    def falls_through(self) -> bool:
        if self.operation in ("EXIT", "RET", "BRX", "BPT"):
            return bool(self.predicate)
        # A branch may have its condition among its operands.
        return self.target is None or bool(self.predicate) or "," in self.operands


@dataclass(frozen=True)
class Turn:
    """One way through a loop.

    Attributes:
        loop: "products", or "gather" for a loop that only copies.
        path: "fewest" or "most" instructions.
        counts: Instructions by class of CLASSES, and "other".
    """

    loop: str
    path: str
    counts: Counter[str]

    @property
    def total(self) -> int:
        return self.counts.total()


def find_disassembler() -> Path:
    """cuobjdump, of Triton, the path or CUDA_HOME.

    Raises:
        ReportError: there is none.
    """
    candidates = [TRITON_BIN / "cuobjdump"]
    if (found := shutil.which("cuobjdump")) is not None:
        candidates.append(Path(found))
    candidates.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump")
    for path in candidates:
        if path.is_file():
            return path
    raise ReportError(
        f"no cuobjdump in {TRITON_BIN}, on the path or in CUDA_HOME: `make .triton` installs one"
    )


def disassemble(path: Path, symbols: Sequence[str]) -> Iterator[tuple[str, str, list[Instruction]]]:
    """(symbol, architecture, instructions) of these kernels of an object file."""
    tool = find_disassembler()
    # It calls nvdisasm, which stands beside it.
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [tool, "-sass", "-fun", ",".join(symbols), path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        symbol, arch, found = "", "", list[Instruction]()
        for line in process.stdout:
            if match := _INSTRUCTION.match(line):
                address, predicate, operation, operands = match.groups()
                name = operation.partition(".")[0]
                found.append(Instruction(int(address, 16), predicate or "", name, operands))
            elif match := _FUNCTION.match(line) or _ARCH.match(line):
                if found:
                    yield symbol, arch, found
                    found = []
                if line.startswith("arch"):
                    arch = match[1]
                else:
                    symbol = match[1]
        if found:
            yield symbol, arch, found
    if process.returncode != 0:
        raise ReportError(f"cuobjdump cannot read {path}")


class Graph:
    """Basic blocks of a kernel, by number in order of address, and which follow which."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        starts = {code[0].address}
        for instruction, following in itertools.pairwise(code):
            if instruction.target is not None:
                starts.add(instruction.target)
            if instruction.target is not None or not instruction.falls_through:
                starts.add(following.address)
        self.blocks: list[list[Instruction]] = []
        for instruction in code:
            if instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        by_address = {block[0].address: number for number, block in enumerate(self.blocks)}
        self.following: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            next_blocks = set()
            if (target := block[-1].target) is not None:
                next_blocks.add(by_address[target])
            if block[-1].falls_through and number + 1 < len(self.blocks):
                next_blocks.add(number + 1)
            self.following.append(sorted(next_blocks))

    def loops(self) -> dict[int, set[int]]:
        """The blocks of every loop, by the one that it is entered at."""
        preceding: list[set[int]] = [set() for _ in self.blocks]
        for number, next_blocks in enumerate(self.following):
            for follower in next_blocks:
                preceding[follower].add(number)
        found: dict[int, set[int]] = {}
        for latch, head in self._back_edges(preceding):
            body, pending = {head, latch}, [latch]
            while pending:
                number = pending.pop()
                for other in preceding[number] - body if number != head else ():
                    body.add(other)
                    pending.append(other)
            found.setdefault(head, set()).update(body)
        return found

    def _back_edges(self, preceding: Sequence[set[int]]) -> list[tuple[int, int]]:
        """Edges to a block that every way to where they begin leads through."""
        order = self._from_entry()
        everything = set(order)
        dominators = dict.fromkeys(order, everything) | {0: {0}}
        changed = True
        while changed:
            changed = False
            for number in order[1:]:
                ways = [dominators[other] for other in preceding[number] if other in everything]
                new = set.intersection(*ways) | {number}
                changed |= new != dominators[number]
                dominators[number] = new
        return [
            (number, follower)
            for number in order
            for follower in self.following[number]
            if follower in dominators[number]
        ]

    def _from_entry(self) -> list[int]:
        """Blocks that can be reached, each before what follows it unless by a loop."""
        done, order = set[int](), list[int]()
        pending = [(0, iter(self.following[0]))]
        while pending:
            number, followers = pending[-1]
            done.add(number)
            follower = next((other for other in followers if other not in done), None)
            if follower is None:
                order.append(number)
                pending.pop()
            else:
                pending.append((follower, iter(self.following[follower])))
        return order[::-1]

    def turn(self, head: int, body: set[int], sign: int) -> list[Instruction]:
        """The way once through a loop with the most (sign 1) or fewest (-1) instructions."""
        best: dict[int, tuple[int, int | None]] = {head: (len(self.blocks[head]), None)}
        order = [number for number in self._from_entry() if number in body]
        position = {number: at for at, number in enumerate(order)}
        for number in order:
            if number not in best:
                continue
            for follower in self.following[number]:
                if follower not in body or position[follower] <= position[number]:
                    continue
                length = best[number][0] + len(self.blocks[follower])
                if follower not in best or sign * length > sign * best[follower][0]:
                    best[follower] = (length, number)
        # A wait at the beginning is a loop that is entered where this one is: it ends earlier.
        at: int | None = max(number for number in best if head in self.following[number])
        path: list[Instruction] = []
        while at is not None:
            path = [*self.blocks[at], *path]
            at = best[at][1]
        return path


def class_of(instruction: Instruction) -> str:
    for name, operations in CLASSES.items():
        if instruction.operation in operations:
            return name
    return "other"


def turns(code: Sequence[Instruction]) -> list[Turn]:
    """Both ways through the loop that multiplies, and through the one that gathers for it.

    Empty for a kernel without products on tensor cores.
    """
    graph = Graph(code)
    found: dict[str, tuple[int, set[int]]] = {}
    for head, body in graph.loops().items():
        operations = {i.operation for number in body for i in graph.blocks[number]}
        loop = "products" if operations & set(CLASSES["products"]) else "gather"
        if loop == "gather" and "LDGSTS" not in operations:
            continue
        # The outermost does the same for every tile.
        if loop not in found or len(body) > len(found[loop][1]):
            found[loop] = head, body
    if "products" not in found:
        return []
    if not any(i.operation == "HGMMA" for i in code):
        # The same warps gather as well; a loop that only copies is not one over tiles.
        found.pop("gather", None)
    return [
        Turn(loop, path, Counter(map(class_of, graph.turn(*found[loop], sign))))
        for loop in sorted(found, reverse=True)
        for path, sign in (("fewest", -1), ("most", 1))
    ]


def read(
    folder: Path, arguments: str = "", sources: str = "*"
) -> Iterator[tuple[kernel_report.Name, kernel_report.Kernel, list[Turn]]]:
    """The kernels of a folder of object files and logs that multiply on tensor cores.

    Args:
        arguments: What their template arguments begin with.
        sources: Pattern of the names of the files that they were compiled from.
    """
    for log in sorted(folder.glob(f"{sources}.log")):
        kernels = {
            (kernel.symbol, kernel.arch): kernel for kernel in kernel_report.parse(log.read_text())
        }
        symbols = sorted({symbol for symbol, _ in kernels})
        names = dict(zip(symbols, kernel_report.demangle(symbols), strict=True))
        wanted = [
            symbol
            for symbol, name in names.items()
            if name.arguments and name.is_hot and name.arguments.startswith(arguments)
        ]
        if not wanted:
            continue
        for symbol, arch, code in disassemble(log.with_suffix(".o"), wanted):
            if found := turns(code):
                yield names[symbol], kernels[symbol, arch], found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=Path, help="their folder; the last build's by default")
    parser.add_argument("--all", action="store_true", help="every head size and dtype")
    options = parser.parse_args()
    folders = [options.objects] if options.objects else sorted(ROOT.glob("build/temp.*/cuda"))
    columns = [*CLASSES, "other"]
    row_format = "{:30} {:26} {:>4} {:>9} {:9} {:7} {:>6}" + " {:>9}" * len(columns)
    header = ("kernel", "arguments", "sm", "registers", "loop", "path", "total", *columns)
    lines = [row_format.format(*header)]
    try:
        for folder in folders:
            for name, kernel, found in read(folder, "" if options.all else DEFAULT_ARGUMENTS):
                described = (name.function, name.arguments, kernel.arch, kernel.registers)
                for turn in found:
                    counts = (turn.counts[column] for column in columns)
                    row = (*described, turn.loop, turn.path, turn.total, *counts)
                    lines.append(row_format.format(*row))
    except ReportError as error:
        print(error)
        return 1
    if len(lines) == 1:
        print("No CUDA kernels have been built here.")
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
