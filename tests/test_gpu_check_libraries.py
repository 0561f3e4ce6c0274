# SPDX-License-Identifier: Apache-2.0
"""CUDA libraries that are packed for a GPU machine keep the code for its GPU alone."""

import shutil
import struct
import subprocess

import pytest
from gpu.pack import thin_fatbin

PTX, ELF = 1, 2


def entry(kind: int, arch: int, code: bytes, compressed: int = 0) -> bytes:
    header = bytearray(64)
    struct.pack_into("<HHII", header, 0, kind, 0x101, 64, len(code))
    struct.pack_into("<I", header, 0x10, compressed)
    struct.pack_into("<I", header, 0x1C, arch)
    return bytes(header) + code


def code_of(*names: str, size: int = 96) -> bytes:
    """As machine code in an ELF file, as far as names go."""
    code = b"\x7fELF" + b"".join(f"\0.text.{name}".encode() for name in names) + b"\0"
    return code.ljust(size, b"\1")


def library(*binaries: list[bytes]) -> bytes:
    """A 64-bit ELF file with fat binaries, 8 bytes of padding after each."""
    fat = b""
    for entries in binaries:
        body = b"".join(entries)
        fat += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + bytes(8)
    names = b"\0.nv_fatbin\0.shstrtab\0"
    fat_at, names_at = 64, 64 + len(fat)
    headers_at = names_at + len(names)
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 0x28, headers_at)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    sections = bytes(64)
    for name, at, size in ((1, fat_at, len(fat)), (12, names_at, len(names))):
        sections += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0)
    return bytes(header) + fat + names + sections


def entries_of(data: bytes) -> list[list[tuple[int, int, bytes]]]:
    """(kind, architecture, code) of every entry, by fat binary."""
    at, size = thin_fatbin.section(data)
    found, end = [], at + size
    while at < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != 0xBA55ED50:
            at += 8
            continue
        found.append(
            [
                (part.kind, part.arch, data[part.start + 64 : part.start + part.size])
                for part in thin_fatbin.entries(data, at + header, at + header + length)
            ]
        )
        at += header + length
    return found


def test_code_for_one_architecture_stays():
    kept = code_of("kept")
    before = library(
        [entry(ELF, 80, code_of("a")), entry(ELF, 90, kept), entry(PTX, 90, code_of("b"))],
        [entry(ELF, 90, kept)],
    )
    after, total = thin_fatbin.thin(before, 90)
    assert entries_of(after) == [[(ELF, 90, kept)]] * 2
    assert len(after) == len(before)
    assert total == {"kept": 320, "dropped": 320}


def test_a_fat_binary_without_such_code_keeps_an_entry_for_another_gpu():
    before = library([entry(ELF, 80, code_of("a", size=200)), entry(PTX, 80, code_of("b"))])
    after, _ = thin_fatbin.thin(before, 90)
    assert entries_of(after) == [[(ELF, 120, bytes(96))]]


@pytest.mark.parametrize("is_compressed", [False, True])
def test_code_is_dropped_when_all_its_kernels_are_unwanted(is_compressed):
    if is_compressed and shutil.which("zstd") is None:
        pytest.skip("needs zstd")

    def packed(*names: str) -> bytes:
        code = code_of(*names)
        if not is_compressed:
            return entry(ELF, 90, code)
        short = subprocess.run(["zstd", "-qc"], input=code, capture_output=True, check=True).stdout
        return entry(ELF, 90, short + bytes(-len(short) % 8), len(short))

    before = library([packed("marlin_1", "marlin_2")], [packed("marlin_1", "norm")])
    after, _ = thin_fatbin.thin(before, 90, without="marlin")
    archs = [[arch for _, arch, _ in found] for found in entries_of(after)]
    assert archs == [[120], [90]]


def test_what_is_no_library_is_refused():
    with pytest.raises(thin_fatbin.FatbinError, match="ELF"):
        thin_fatbin.thin(b"text", 90)
