# SPDX-License-Identifier: Apache-2.0
"""Packs a Llama in GGUF without loss, in parts that each fit into a transfer.

Usage: python benchmarks/gpu/pack/model.py MODEL.gguf OUT --parts 30400000

OUT/0 gets the index and the first part, OUT/1 the second, and so on. unpack_model.py puts them
together. Needs the packages gguf and transformers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFReader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu.gguf_llama import planes
from gpu.gguf_to_hf import save_description
from gpu.packed_model import PackedTensor, compressed, part_name, write_index


def pack(gguf: Path, out: Path, part_bytes: Sequence[int]) -> None:
    """Write parts and index.

    Args:
        part_bytes: Most bytes of each part but the last, which takes the rest.
    Raises:
        ValueError: as gguf_llama.planes and gguf_to_hf.save_description.
    """
    tensors = GGUFReader(gguf).tensors
    index, parts = [], [bytearray()]
    # The largest last, so that parts are filled well.
    for tensor in sorted(tensors, key=lambda tensor: (tensor.n_bytes, tensor.name)):
        kind = tensor.tensor_type.name
        streams = [compressed(plane) for plane in planes(kind, tensor.data)]
        data = b"".join(streams)
        number = len(parts) - 1
        if number < len(part_bytes) and len(parts[-1]) + len(data) > part_bytes[number]:
            parts.append(bytearray())
            number += 1
        shape = tuple(int(size) for size in reversed(tensor.shape))
        sizes = tuple(map(len, streams))
        index.append(PackedTensor(tensor.name, kind, shape, number, len(parts[-1]), sizes))
        parts[-1] += data
    for number, part in enumerate(parts):
        folder = out / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / part_name(number)).write_bytes(part)
    with tempfile.TemporaryDirectory() as described:
        save_description(gguf, Path(described))
        files = {path.name: path.read_text() for path in sorted(Path(described).iterdir())}
    write_index(out / "0", index, files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[], help="bytes of all but the last"
    )
    options = parser.parse_args()
    pack(options.gguf, options.out, options.parts)


if __name__ == "__main__":
    main()
