# SPDX-License-Identifier: Apache-2.0
"""A model in parts that each fit into a transfer: files, and how their streams are compressed.

index.json.xz    tensors in order, and the model's small files by name
part0, part1...  the tensors' planes (gguf_llama.py), one after the other
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

INDEX = "index.json.xz"


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor lies.

    Attributes:
        name: In GGUF.
        kind: ggml's type.
        shape: As transformers has it.
        part: Number of the file.
        offset: In bytes, of its first plane.
        sizes: In bytes, of its planes as they are compressed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    part: int
    offset: int
    sizes: tuple[int, ...]


def part_name(number: int) -> str:
    return f"part{number}"


def compressed(plane: np.ndarray) -> bytes:
    """Huffman codes alone: in weights there is nothing that repeats."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(plane.tobytes()) + coder.flush()


def decompressed(data: bytes) -> np.ndarray:
    """A plane as [num_bytes] uint8.

    Raises:
        zlib.error: the data are damaged.
    """
    return np.frombuffer(zlib.decompress(data, -zlib.MAX_WBITS), np.uint8)


def write_index(folder: Path, tensors: Iterable[PackedTensor], files: dict[str, str]) -> None:
    """The index, with the model's small files in it, by name."""
    index = {"tensors": [asdict(tensor) for tensor in tensors], "files": files}
    (folder / INDEX).write_bytes(lzma.compress(json.dumps(index).encode(), preset=9))


def read_index(path: Path) -> tuple[list[PackedTensor], dict[str, str]]:
    """Tensors, and the model's small files by name."""
    index = json.loads(lzma.decompress(path.read_bytes()))
    tensors = [
        PackedTensor(**{**entry, "shape": tuple(entry["shape"]), "sizes": tuple(entry["sizes"])})
        for entry in index["tensors"]
    ]
    return tensors, index["files"]


def find(folders: Sequence[Path], name: str) -> Path:
    """A file that lies in one of several folders.

    Raises:
        FileNotFoundError: it lies in none.
    """
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}")
