# SPDX-License-Identifier: Apache-2.0
"""From a GGUF file to what transformers and vLLM load: weights in bfloat16, config, tokenizer.

Needs the packages of requirements/models.txt (download.use_tools).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Where the files lay when they were converted, which is of no use to anybody.
_LEFT_OUT = ("_model_name_or_path", "quantization_config", "_from_model_config", "is_local",
             "local_files_only")  # fmt: skip


def convert(gguf: Path, folder: Path, name: str) -> None:
    """Write the model.

    Args:
        gguf: A model that transformers reads.
        folder: Where to.
        name: Under which the model was published.
    """
    # Everything is in the file. huggingface_hub reads this when it is imported, which is as late as
    # this, so that a model that is there already costs no import.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    begins = _begins_with_bos(gguf)
    # transformers reads it, and then does without it.
    tokenizer.add_bos_token = begins
    tokenizer.update_post_processor()
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    config = model.config
    if hasattr(config, "quantization_config"):
        # save_pretrained would take the weights for quantised ones.
        del config.quantization_config
    tokenizer.model_max_length = config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    # safetensors lets nobody else read it, such as the user of a container.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    _edit(folder / "config.json", {"_name_or_path": name})
    _edit(folder / "generation_config.json", {})
    _edit(folder / "tokenizer_config.json", {"add_bos_token": begins})


def _begins_with_bos(gguf: Path) -> bool:
    """Whether the model was trained on texts that begin with its BOS token."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _edit(path: Path, changes: dict[str, Any]) -> None:
    """Leave out what only describes the conversion, and set some keys."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in _LEFT_OUT}
    path.write_text(json.dumps(changes | kept | changes, indent=2) + "\n", encoding="utf-8")
