# SPDX-License-Identifier: Apache-2.0
"""Shows that this harness adds nothing of its own to what kvpress and transformers do."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import Method
from ems_vllm.eval.records.prompt_files import PromptLine
from peers.branch import Branch
from peers.budgets import chunks
from peers.decode import Decoder
from peers.layers import sliding_windows
from peers.model import Model
from peers.official import Official, decoded_cam, same_entries
from peers.prefill import prefill
from peers.presses import ENGINE, NAMES, PressOptions, build

_LENGTHS = (40, 333, 1000)
_MAX_TOKENS = 24
_BUDGETS = (24, 100)
# Of logits, relative to their size: other kernels, and what hidden entries of kvpress still share.
_TOLERANCE = 1e-3


def check(name: str, device: str, dtype: str) -> list[str]:
    """Compare with plain transformers and with the presses used as kvpress documents.

    Returns:
        What differs, a sentence each; empty when all is well.
    """
    model = Model(name, device, dtype)
    generator = random.Random(0)
    failures = []
    for length in _LENGTHS:
        prompt = PromptLine(
            task="random",
            length=length,
            seed=0,
            index=0,
            depth=None,
            prompt="",
            prompt_token_ids=generator.choices(range(model.model.config.vocab_size), k=length),
            max_tokens=_MAX_TOKENS,
            stop=(),
            references=(),
        )
        failures += _unlimited(model, prompt)
        for entries in _BUDGETS:
            if entries < length:
                failures += _limited(model, prompt, entries)
    return failures


def _names(model: Model) -> list[str]:
    return [name for name in NAMES if model.supports(name)]


def _unlimited(model: Model, prompt: PromptLine) -> list[str]:
    """With a budget of the prompt's length, every press answers like greedy `generate`."""
    length = len(prompt.prompt_token_ids)
    with torch.inference_mode():
        input_ids = torch.tensor([prompt.prompt_token_ids], device=model.model.device)
        tokens = model.model.generate(
            input_ids,
            # Without a mask, a token of the prompt that is used for padding would be hidden.
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=_MAX_TOKENS,
        )
    expected = model.vocabulary.decode(tokens[0, length:].tolist())
    methods = [Method(name, ENGINE, Budget(count=length)) for name in _names(model)]
    return [
        f"{method.name}, {length} tokens, nothing dropped: {line.output!r}, not {expected!r}"
        for method, line in model.answers(prompt, methods, seed=0)
        if line.output != expected
    ]


def _limited(model: Model, prompt: PromptLine, entries: int) -> list[str]:
    """Presses side by side leave what each leaves alone, of the size asked for."""
    token_ids = prompt.prompt_token_ids
    length = len(token_ids)
    options = PressOptions(entries, length, seed=0)
    together = prefill(
        model.model, token_ids, {name: build(name, options) for name in _names(model)}
    )
    failures = []
    for name, branch in together.branches.items():
        where = f"{name}, {length} tokens, {entries} entries"
        failures += [
            f"{where}: {what}" for what in _differences(model, prompt, name, entries, branch)
        ]
        excess = branch.entries_per_head() - entries
        if not _least_excess(name, entries, length) <= excess <= (name == "pyramidkv"):
            failures.append(f"{where}: {branch.entries_per_head()} entries per kv_head")
        failures += [f"{where}: {what}" for what in _decodes_wrong(model, branch)]
    return failures


def _least_excess(name: str, entries: int, length: int) -> float:
    """How many entries fewer than asked for a press may keep, as a negative number."""
    if name == "pyramidkv":
        # Rounding the layers of a pyramid moves its mean by less than an entry.
        return -1
    return 1 - chunks(entries, length)[0] if name == "chunkkv_snapkv" else 0


def _differences(
    model: Model, prompt: PromptLine, name: str, entries: int, branch: Branch
) -> list[str]:
    """What a press used as kvpress documents leaves otherwise, and what attention sees of it."""
    if any(window is not None for window in sliding_windows(model.model)):
        # There kvpress compresses, or refuses, what is not to be compressed.
        return []
    token_ids = prompt.prompt_token_ids

    def alone() -> Any:
        # Scores are not shared: every memo is a new one.
        return build(name, PressOptions(entries, len(token_ids), seed=0))

    found = []
    official = Official(model.model, alone(), token_ids)
    if not same_entries(official.layers, branch.layers):
        found.append("the cache is another one than under the press alone")
    if name == "cam_knorm":
        decoded = decoded_cam(model.model, alone(), token_ids)
        if not same_entries(decoded, branch.layers, _TOLERANCE):
            found.append("the cache is another one than after decoding the prompt")
    token = model.model.config.vocab_size // 2
    expected = official.step(token, branch.next_position)
    logits = Decoder(model.model, [branch]).step([token])
    if expected is not None and not _close(logits[0], expected):
        found.append("the next token is another one than in kvpress")
    return found


def _decodes_wrong(model: Model, branch: Branch) -> list[str]:
    """Several tokens at a time, beside other answers, and whatever hidden entries hold."""
    generator = random.Random(1)
    tokens = generator.choices(range(model.model.config.vocab_size), k=7)
    alone = Decoder(model.model, [branch])
    one_by_one = torch.stack([alone.step([token])[0] for token in tokens])
    shorter = Branch(
        [
            replace(layer, keys=layer.keys[:, :, :9], values=layer.values[:, :, :9], visible=None)
            for layer in branch.layers
        ],
        branch.next_position,
    )
    poisoned = Branch(
        [
            layer
            if layer.visible is None
            else replace(layer, values=layer.values.masked_fill(~layer.visible[..., None], 1e4))
            for layer in branch.layers
        ],
        branch.next_position,
    )
    beside = Decoder(model.model, [shorter, poisoned])
    at_once = beside.extend([tokens] * 2)[1]
    beside.rewind(3)
    again = beside.extend([tokens[3:]] * 2)[1]
    found = []
    if not _close(at_once, one_by_one):
        found.append("several tokens at a time are not what they are one by one")
    if not _close(again, one_by_one[3:]):
        found.append("tokens that were taken back are remembered")
    return found


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
