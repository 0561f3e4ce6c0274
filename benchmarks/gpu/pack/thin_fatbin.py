# SPDX-License-Identifier: Apache-2.0
"""Takes code for other GPUs out of a CUDA library, so that it packs into a tenth.

Usage: python benchmarks/gpu/pack/thin_fatbin.py IN OUT [--arch 90] [--without EXPRESSION]

A CUDA library holds fat binaries in its section .nv_fatbin: a header each, then entries of machine
code (ELF) or PTX for one architecture. Of every fat binary the machine code for one architecture
stays. One of which nothing stays gets a stand-in for another GPU: a driver knows binaries without
code for its GPU, but perhaps none without any code. Each fat binary stays where it was, shorter,
with zeros behind it, so the library links and registers its kernels as before; zeros cost next to
nothing in xz. Needs zstd where names of kernels are looked at.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SECTION = ".nv_fatbin"
_MAGIC = 0xBA55ED50
# Magic, version, size of this header, size of the entries.
_FAT_HEADER = struct.Struct("<IHHQ")
# Kind, version, size of the entry's header, size of its code; the architecture comes later.
_ENTRY_HEADER = struct.Struct("<HHIQ")
_COMPRESSED_SIZE_AT = 0x10
_ARCH_AT = 0x1C
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Every kernel has a section of its own.
_KERNEL = re.compile(rb"\0\.text\.(\w+)")
_PTX, _ELF = 1, 2
# What a stand-in claims to be for.
_STAND_IN_ARCH = 120


class FatbinError(RuntimeError):
    """The file is no library with CUDA code."""


@dataclass(frozen=True)
class Entry:
    """Code for one architecture.

    Attributes:
        kind: _PTX or _ELF.
        arch: As in sm_90, without "sm_".
        start, size: In bytes, the entry's header included.
    """

    kind: int
    arch: int
    start: int
    size: int


def section(data: bytes, name: str = _SECTION) -> tuple[int, int]:
    """Offset and size in bytes of a section of a 64-bit ELF file.

    Raises:
        FatbinError: there is none of this name.
    """
    if data[:5] != b"\x7fELF\x02":
        raise FatbinError("this is no 64-bit ELF file")
    (headers_at,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", data, headers_at + index * size) for index in range(count)
    ]
    for header in headers:
        start = headers[names][4] + header[0]
        if data[start : data.index(b"\0", start)].decode() == name:
            return header[4], header[5]
    raise FatbinError(f"there is no section {name}")


def entries(data: bytes, begin: int, end: int) -> Iterator[Entry]:
    """Of one fat binary, whose entries lie from `begin` to `end`."""
    while begin < end:
        kind, _, header_size, code_size = _ENTRY_HEADER.unpack_from(data, begin)
        if not header_size:
            return
        (arch,) = struct.unpack_from("<I", data, begin + _ARCH_AT)
        yield Entry(kind, arch, begin, header_size + code_size)
        begin += header_size + code_size


def kernels(data: bytes, entry: Entry) -> list[bytes]:
    """Mangled names of an entry's kernels.

    Raises:
        FatbinError: the code is compressed, and zstd is not there or cannot read it.
    """
    _, _, header_size, _ = _ENTRY_HEADER.unpack_from(data, entry.start)
    code = data[entry.start + header_size : entry.start + entry.size]
    if code.startswith(_ZSTD_MAGIC):
        (size,) = struct.unpack_from("<I", data, entry.start + _COMPRESSED_SIZE_AT)
        try:
            done = subprocess.run(["zstd", "-dcq"], input=code[:size], capture_output=True)
        except FileNotFoundError:
            raise FatbinError("zstd is not there, and the code is compressed with it") from None
        if done.returncode:
            raise FatbinError(f"zstd cannot read the code: {done.stderr.decode().strip()}")
        code = done.stdout
    return _KERNEL.findall(code)


def stand_in(data: bytes, found: list[Entry]) -> bytes:
    """The smallest entry, as if for another GPU, with zeros for code."""
    smallest = min(found, key=lambda entry: entry.size)
    _, version, header_size, code_size = _ENTRY_HEADER.unpack_from(data, smallest.start)
    entry = bytearray(data[smallest.start : smallest.start + header_size] + bytes(code_size))
    _ENTRY_HEADER.pack_into(entry, 0, _ELF, version, header_size, code_size)
    struct.pack_into("<I", entry, _ARCH_AT, _STAND_IN_ARCH)
    return bytes(entry)


def thin(library: bytes, arch: int, without: str | None = None) -> tuple[bytes, Counter[str]]:
    """A library with machine code for one architecture.

    Args:
        arch: As in sm_90, without "sm_".
        without: A regular expression; code goes too when it is found in every kernel's name.
    Returns:
        The library, as long as before, and bytes "kept" and "dropped".
    Raises:
        FatbinError: this is no library with CUDA code, or its code cannot be read.
    """
    unwanted = re.compile(without.encode()) if without else None

    def stays(entry: Entry) -> bool:
        if (entry.kind, entry.arch) != (_ELF, arch):
            return False
        if unwanted is None:
            return True
        names = kernels(library, entry)
        return not (names and all(unwanted.search(name) for name in names))

    data = bytearray(library)
    at, size = section(library)
    end = at + size
    total: Counter[str] = Counter()
    while at + _FAT_HEADER.size <= end:
        magic, version, header_size, fat_size = _FAT_HEADER.unpack_from(library, at)
        if magic != _MAGIC:
            # Between fat binaries there may be padding.
            at += 8
            continue
        begin = at + header_size
        found = list(entries(library, begin, begin + fat_size))
        kept = b""
        for entry in found:
            if stays(entry):
                kept += library[entry.start : entry.start + entry.size]
                total["kept"] += entry.size
            else:
                total["dropped"] += entry.size
        if found:
            kept = kept or stand_in(library, found)
        data[begin : begin + fat_size] = kept + bytes(fat_size - len(kept))
        _FAT_HEADER.pack_into(data, at, magic, version, header_size, len(kept))
        at = begin + fat_size
    return bytes(data), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="as in sm_90, without sm_")
    parser.add_argument("--without", help="drop code whose kernels' names have this in them")
    options = parser.parse_args()
    library, total = thin(options.source.read_bytes(), options.arch, options.without)
    options.target.write_bytes(library)
    options.target.chmod(0o755)
    kept, dropped = (total[name] / 1e6 for name in ("kept", "dropped"))
    print(f"{options.source.name}: {kept:.1f} MB of code kept, {dropped:.1f} MB dropped")


if __name__ == "__main__":
    main()
