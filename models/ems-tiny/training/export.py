# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint as a model folder that transformers and vLLM load.

Usage (in models/ems-tiny): python -m training.export \\
    --run FOLDER --out FOLDER [--preset cpu]
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from training.model import ModelConfig
from training.presets import PRESETS


def to_transformers(state: dict[str, torch.Tensor], config: ModelConfig) -> LlamaForCausalLM:
    """The weights in a `LlamaForCausalLM`, float32."""
    model = LlamaForCausalLM(config.to_hf())
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"the checkpoint does not fit: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.eval()


def export(run: Path, config: ModelConfig, out: Path) -> None:
    """Write `out`, replacing its files only once all new ones are written."""
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    model = to_transformers(state, config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=3, do_sample=False
    )
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(run / "tokenizer").save_pretrained(new)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(new.iterdir()):
        os.replace(path, out / path.name)
    new.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the --out of training.train")
    parser.add_argument("--out", type=Path, required=True, help="model folder")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    args = parser.parse_args()
    disable_progress_bar()
    export(args.run, PRESETS[args.preset].model, args.out)


if __name__ == "__main__":
    main()
