# SPDX-License-Identifier: Apache-2.0
"""Makes a folder that transformers and vLLM load of a GGUF file with a Llama.

Usage: python benchmarks/gpu/gguf_to_hf.py MODEL.gguf FOLDER

Needs the packages gguf and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.gguf_llama import hf_name, hf_weight, planes, values


def save_description(gguf: Path, folder: Path) -> None:
    """Everything but the weights: config, tokenizer, chat template.

    Raises:
        ValueError: the model is no Llama.
    """
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if config.model_type != "llama":
        raise ValueError(f"{gguf.name} holds a {config.model_type}, not a llama")
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def convert(gguf: Path, folder: Path) -> None:
    """The whole model, its weights in bfloat16.

    Raises:
        ValueError: the model is no Llama, or has tensors of another type than Q4_1, Q8_0 and F32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_description(gguf, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        kind, shape = tensor.tensor_type.name, [int(size) for size in reversed(tensor.shape)]
        found = values(kind, planes(kind, tensor.data), shape)
        weights[hf_name(tensor.name)] = hf_weight(tensor.name, found, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    convert(options.gguf, options.folder)


if __name__ == "__main__":
    main()
