# SPDX-License-Identifier: Apache-2.0
"""Records which entries kvpress keeps, so that others can be compared with it without it.

    PYTHONPATH=.:benchmarks:tests/policies .venv-peers/bin/python -m peers.record_indices \\
        tests/policies/kvpress.json

Inputs are those of tests/policies/kvpress_inputs.py.
The file has, by method and entries per kv_head, [layer][kv_head], a mask over positions in hex:
the first digit is positions 0 to 3, its highest bit position 0.

Where scores are equal, `topk` chooses, and another implementation may choose otherwise. Only lagkv
has such scores:

* `lagkv` (lag_size 64) always keeps 4 + 124 positions, and at 80 an arbitrary part of them.
  At 160 its three partitions share 32, so two of the three entries ranked 11th stay.
* `lagkv 32` has none: of 8 partitions 2 or 12 entries each, and the first 4 and last 60 positions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress_inputs import (
    BUDGETS,
    HEAD_SIZE,
    HIDDEN,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_POSITIONS,
    NUM_SINKS,
    NUM_TOKENS,
    ROPE_THETA,
    WINDOW,
    Layer,
    layer,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

_KERNEL = 5
# By how many entries a mean over layers may miss the budget.
_ROUNDING = 0.5


def presses() -> dict[str, Callable[[float], Any]]:
    """Methods by name: from the part of the entries that is dropped to the press."""
    snapkv = partial(kvpress.SnapKVPress, window_size=WINDOW, kernel_size=_KERNEL)
    pyramidkv = partial(kvpress.PyramidKVPress, window_size=WINDOW, kernel_size=_KERNEL)
    lagkv = partial(kvpress.LagKVPress, n_sink=NUM_SINKS)
    expected = kvpress.ExpectedAttentionPress
    return {
        "knorm": kvpress.KnormPress,
        "snapkv": snapkv,
        "pyramidkv": partial(pyramidkv, beta=20),
        # With 20, layers have no pyramid at 80, and the last one only the window at 160.
        "pyramidkv 4": partial(pyramidkv, beta=4),
        "streaming_llm": partial(kvpress.StreamingLLMPress, n_sink=NUM_SINKS),
        "keydiff": kvpress.KeyDiffPress,
        "tova": kvpress.TOVAPress,
        "expected_attention": expected,
        "expected_attention 0.01": partial(expected, epsilon=1e-2),
        "criticalkv snapkv": lambda ratio: kvpress.CriticalKVPress(snapkv(ratio)),
        "adakv snapkv": lambda ratio: kvpress.AdaKVPress(snapkv(ratio)),
        "adakv snapkv 0": lambda ratio: kvpress.AdaKVPress(snapkv(ratio), alpha_safeguard=0.0),
        "criticaladakv snapkv": lambda ratio: kvpress.CriticalAdaKVPress(snapkv(ratio)),
        "lagkv": partial(lagkv, lag_size=64),
        "lagkv 32": partial(lagkv, lag_size=32),
        "chunkkv snapkv": lambda ratio: kvpress.ChunkKVPress(snapkv(ratio), chunk_length=16),
    }


def kept(press: Any, inputs: Layer, index: int, dtype: torch.dtype) -> torch.Tensor:
    """[NUM_KV_HEADS, NUM_TOKENS]: which entries of layer `index` the press leaves."""
    module, rotary = _attention(inputs, index, dtype)
    # q_proj is the identity.
    hidden_states = inputs.queries.reshape(1, NUM_TOKENS, HIDDEN).to(dtype)
    keys, values = inputs.keys[None].to(dtype), inputs.values[None].to(dtype)
    positions = torch.arange(NUM_TOKENS)[None]
    kwargs = {"position_embeddings": rotary(hidden_states, positions)}
    left = press.compress(module, hidden_states, keys, values, None, kwargs)
    result = _found(keys[0], left[0][0])
    assert result.equal(_found(values[0], left[1][0]))
    if (masked := getattr(module, "masked_key_indices", None)) is not None:
        assert result.all()
        result[masked[1:]] = False
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Record which entries kvpress keeps.")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    out = parser.parse_args().out
    settings, masks = {}, {}
    with torch.inference_mode():
        for name, build in presses().items():
            settings[name] = _settings(build(0.0))
            masks[name] = {budget: _recorded(name, build, budget) for budget in BUDGETS}
    out.write_text(_document(settings, masks))


def _attention(
    inputs: Layer, index: int, dtype: torch.dtype
) -> tuple[LlamaAttention, LlamaRotaryEmbedding]:
    """An attention of its own per press: presses leave notes on it."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=NUM_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attn_implementation="sdpa",
    )
    module = LlamaAttention(config, index)
    module.q_proj.weight.copy_(torch.eye(HIDDEN))
    module.o_proj.weight.copy_(inputs.output_weight)
    # Where a model would have put it for the press.
    module.rotary_emb = LlamaRotaryEmbedding(config)
    return module.to(dtype).eval(), module.rotary_emb


def _found(rows: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Per head, which of `rows` are among others, all of which are expected to be rows."""
    same = (rows[:, :, None] == among[:, None]).all(-1)
    assert same.sum(1).eq(1).all()
    return same.any(-1)


def _recorded(name: str, build: Callable[[float], Any], budget: int) -> list[list[str]]:
    ratio = 1 - budget / NUM_TOKENS
    masks = []
    for index in range(NUM_LAYERS):
        inputs = layer(index)
        single, double = (
            kept(build(ratio), inputs, index, dtype) for dtype in (torch.float32, torch.float64)
        )
        # Else the choice hangs on the order of a sum.
        assert single.equal(double), f"{name}, {budget} entries, layer {index}: too close"
        masks.append(single)
    counts = torch.stack(masks).sum(-1)
    print(f"{name}, {budget}: {counts.tolist()}")
    _check_counts(name, budget, counts)
    return [[_hex(mask) for mask in of_layer] for of_layer in masks]


def _check_counts(name: str, budget: int, counts: torch.Tensor) -> None:
    """[layer, kv_head]: the budget, on average over those that share it."""
    if name.startswith("pyramidkv"):
        assert counts.eq(counts[:, :1]).all()
        # Layers are rounded one by one.
        assert abs(counts.double().mean() - budget) <= _ROUNDING
    elif name.startswith(("adakv", "criticaladakv")):
        assert counts.sum(1).eq(NUM_KV_HEADS * budget).all()
    else:
        assert counts.eq(budget).all()


def _settings(press: Any) -> dict[str, Any]:
    """What a press was built from, besides the budget."""
    options = {name: value for name, value in vars(press).items() if name != "compression_ratio"}
    if "press" in options:
        options["press"] = _settings(options["press"])
    return {"class": type(press).__name__, **options}


def _hex(mask: torch.Tensor) -> str:
    digits = ("".join("01"[is_kept] for is_kept in four) for four in mask.view(-1, 4).tolist())
    return "".join(f"{int(digit, 2):x}" for digit in digits)


def _document(settings: dict[str, Any], masks: dict[str, dict[int, list[list[str]]]]) -> str:
    """JSON with a line per method's settings, and per method and budget."""
    budgets = {
        name: _object({str(budget): of_budget for budget, of_budget in of_method.items()}, 3)
        for name, of_method in masks.items()
    }
    kept_of = ",\n".join(f"    {json.dumps(name)}: {text}" for name, text in budgets.items())
    return (
        f'{{\n  "kvpress": {json.dumps(version("kvpress"))},\n'
        f'  "settings": {_object(settings, 2)},\n'
        f'  "kept": {{\n{kept_of}\n  }}\n}}\n'
    )


def _object(members: dict[str, Any], depth: int) -> str:
    """With a line per member, however long."""
    indent = "  " * depth
    lines = ",\n".join(
        f"{indent}{json.dumps(name)}: {json.dumps(member)}" for name, member in members.items()
    )
    return f"{{\n{lines}\n{indent[2:]}}}"


if __name__ == "__main__":
    main()
