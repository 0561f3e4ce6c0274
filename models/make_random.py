# SPDX-License-Identifier: Apache-2.0
"""Make the small models that the examples and tests run: random weights, a tokenizer of real text.

Usage: python models/make_random.py [--out FOLDER]

Nothing is downloaded, the result depends on the seed alone, and a model that is there already is
left as it is.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
SEED = 2412
CONTEXT = 8192
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
STAMP = "made_from.json"

COMMON = {
    "vocab_size": 2048,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    # Wide enough that attention picks out tokens, and that greedy decoding does not settle on one.
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS.index("<s>"),
    "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
    "dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "random-llama": {
        "initializer_range": 0.16,
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "random-qwen3": {
        "num_hidden_layers": 3,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string can be encoded, no token is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=COMMON["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def build(name: str) -> PreTrainedModel:
    """A model with random weights."""
    settings = COMMON | MODELS[name]
    torch.manual_seed(SEED)
    if not name.endswith("qwen3"):
        return LlamaForCausalLM(LlamaConfig(**settings))
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    # Normalised queries and keys give nearly uniform attention; trained weights are larger too, and
    # uneven. With even ones all keys would have one norm, and a choice by norm would be noise.
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.fill_(4.0)
        layer.self_attn.k_norm.weight.data.uniform_(0.25, 1.75)
    return model


def fingerprint(name: str, text: str) -> str:
    """Changes whenever the model would."""
    recipe = json.dumps([SEED, COMMON, MODELS[name], text]) + Path(__file__).read_text()
    return hashlib.sha256(recipe.encode()).hexdigest()


def make(name: str, out: Path) -> bool:
    """Write one model; False where it is there already."""
    text = "\n".join(path.read_text() for path in sorted((HERE / "text").glob("*.txt")))
    stamp = {"make_random": fingerprint(name, text)}
    folder = out / name
    if (folder / STAMP).is_file() and json.loads((folder / STAMP).read_text()) == stamp:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(text).save_pretrained(folder)
    build(name).save_pretrained(folder)
    # Last, so that an interrupted run is not taken for a finished one.
    (folder / STAMP).write_text(json.dumps(stamp) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the model folders go")
    out = parser.parse_args().out
    disable_progress_bar()
    for name in MODELS:
        print(f"{out / name}: {'made' if make(name, out) else 'there already'}")


if __name__ == "__main__":
    main()
