# SPDX-License-Identifier: Apache-2.0
"""What serving.py serves: models, prompts and pools, for a GPU and for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_SIZE = 16
CONFIGURATIONS = ("dense", "ems", "heads")
# Of a half of a prompt, kept by a kv_head and by the next one.
UNEQUAL = (0.75, 0.25)


@dataclass(frozen=True)
class Size:
    """What is served.

    Attributes:
        model: Fields of LlamaConfig.
        budget, window, interval: Settings of the compression.
        num_tight: Long prompts at a time; the dense pool holds `num_decode` of them.
    """

    model: dict[str, int]
    dtype: str
    budget: int
    window: int
    interval: int
    prompt_len: int
    num_new_tokens: int
    num_tight: int
    num_decode: int
    identity_lens: tuple[int, ...]
    chunk: int

    @property
    def max_model_len(self) -> int:
        return self.prompt_len + self.num_new_tokens

    @property
    def num_blocks(self) -> int:
        """Of the pool; the last one is vLLM's null block."""
        return self.num_decode * -(-self.max_model_len // BLOCK_SIZE) + 1

    def compression(self, name: str) -> dict[str, Any] | None:
        """Of a configuration, for `additional_config`."""
        if name == "dense":
            return None
        settings: dict[str, Any] = {
            "recipe": "ems",
            "budget": self.budget,
            "recent_window": self.window,
            "recompress_interval": self.interval,
        }
        if name == "heads":
            settings["allocator"] = self._by_head()
        return settings

    def _by_head(self) -> dict[str, Any]:
        """An allocator that deals neighbouring kv_heads unequal shares, in each layer others."""
        layers = range(self.model["num_hidden_layers"])
        heads = range(self.model["num_key_value_heads"])
        profile = {
            "ratios": [0.5],
            "fractions": {layer: [0.5] for layer in layers},
            "head_fractions": {
                layer: [[UNEQUAL[(layer + head) % 2]] for head in heads] for layer in layers
            },
        }
        return {
            "name": "profile",
            "profile": profile,
            "uniform_share": 0,
            "num_levels": 1,
            "per_head": True,
        }


_COMMON = {"vocab_size": 32000, "max_position_embeddings": 32768}
SIZES = {
    "gpu": Size(
        model=_COMMON
        | {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        dtype="bfloat16",
        budget=1024,
        window=64,
        interval=128,
        prompt_len=8000,
        num_new_tokens=192,
        num_tight=32,
        num_decode=8,
        identity_lens=(1, 15, 16, 17, 500, 900),
        chunk=8192,
    ),
    "tiny": Size(
        model=_COMMON
        | {
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        dtype="float32",
        budget=64,
        window=32,
        interval=16,
        prompt_len=300,
        num_new_tokens=24,
        num_tight=4,
        num_decode=2,
        identity_lens=(1, 16, 17, 60),
        chunk=256,
    ),
}


def make_model(size: Size, folder: Path) -> None:
    """A Llama with random weights, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**size.model, initializer_range=0.05, tie_word_embeddings=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, size.dtype)).save_pretrained(folder)
