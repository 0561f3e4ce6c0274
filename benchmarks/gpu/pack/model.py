# SPDX-License-Identifier: Apache-2.0
"""Packs a Llama that comes as GGUF without loss, in parts that each fit into a transfer.

Usage: python benchmarks/gpu/pack/model.py smollm2 OUT --parts 30000000

The model is got by models/get.py. OUT/0 gets the index and the first part, OUT/1 the second, and so
on. unpack_model.py puts them together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "models"))

from get import HERE as MODELS_FOLDER
from get import get
from pretrained.catalogue import MODELS
from pretrained.download import GetError, fetch_gguf, use_tools

from gpu.gguf_llama import hf_name, hf_weight, planes, values
from gpu.packed_model import PackedTensor, compressed, part_name, write_index


def pack(gguf: Path, converted: Path, out: Path, part_bytes: Sequence[int]) -> None:
    """Write parts and index.

    Args:
        gguf: What is packed.
        converted: The same model as transformers has it. Its small files go into the index.
        part_bytes: Most bytes of each part but the last, which takes the rest.
    Raises:
        ValueError: as gguf_llama.planes, or a tensor would not be unpacked to what transformers
            made of it.
    """
    from gguf import GGUFReader

    files = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(converted.iterdir())
        if path.suffix != ".safetensors"
    }
    config = json.loads(files["config.json"])
    weights = load_file(converted / "model.safetensors")
    tensors = GGUFReader(gguf).tensors
    index, parts = [], [bytearray()]
    # The largest last, so that parts are filled well.
    for tensor in sorted(tensors, key=lambda tensor: (tensor.n_bytes, tensor.name)):
        kind = tensor.tensor_type.name
        shape = tuple(int(size) for size in reversed(tensor.shape))
        taken_apart = planes(kind, tensor.data)
        unpacked = hf_weight(tensor.name, values(kind, taken_apart, shape), config)
        if not torch.equal(unpacked, weights[hf_name(tensor.name)]):
            raise ValueError(f"{tensor.name} is not what transformers makes of it")
        streams = [compressed(plane) for plane in taken_apart]
        data = b"".join(streams)
        number = len(parts) - 1
        if number < len(part_bytes) and len(parts[-1]) + len(data) > part_bytes[number]:
            parts.append(bytearray())
            number += 1
        sizes = tuple(map(len, streams))
        index.append(PackedTensor(tensor.name, kind, shape, number, len(parts[-1]), sizes))
        parts[-1] += data
    for number, part in enumerate(parts):
        folder = out / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / part_name(number)).write_bytes(part)
    write_index(out / "0", index, files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[], help="bytes of all but the last"
    )
    options = parser.parse_args()
    try:
        get(options.name)
        use_tools()
        gguf = fetch_gguf(MODELS[options.name])
    except GetError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(options.out, ignore_errors=True)
    pack(gguf, MODELS_FOLDER / options.name, options.out, options.parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
