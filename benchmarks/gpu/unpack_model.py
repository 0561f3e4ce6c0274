# SPDX-License-Identifier: Apache-2.0
"""Puts a model together that came in several transfers, as a folder that vLLM loads.

Usage: python benchmarks/gpu/unpack_model.py PACKED [PACKED...] --out FOLDER

The parts may lie in several folders. Needs numpy, torch and safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.gguf_llama import hf_name, hf_weight, values
from gpu.packed_model import INDEX, PackedTensor, decompressed, find, part_name, read_index


def unpack(packed: Sequence[Path], folder: Path) -> int:
    """Write the model, its weights in bfloat16; the number of its tensors.

    Raises:
        FileNotFoundError: a part is missing.
    """
    tensors, files = read_index(find(packed, INDEX))
    config = json.loads(files["config.json"])
    numbers = {tensor.part for tensor in tensors}
    parts = {number: find(packed, part_name(number)).read_bytes() for number in numbers}

    def weight(tensor: PackedTensor) -> torch.Tensor:
        planes, at = [], tensor.offset
        for size in tensor.sizes:
            planes.append(decompressed(parts[tensor.part][at : at + size]))
            at += size
        return hf_weight(tensor.name, values(tensor.kind, planes, tensor.shape), config)

    with ThreadPoolExecutor() as pool:
        weights = dict(
            zip(
                (hf_name(tensor.name) for tensor in tensors),
                pool.map(weight, tensors),
                strict=True,
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (folder / name).write_text(text)
    return len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    # Threads of ours take a tensor each.
    torch.set_num_threads(1)
    started = time.monotonic()
    count = unpack(options.packed, options.out)
    print(f"{count} tensors into {options.out} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
