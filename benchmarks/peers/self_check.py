# SPDX-License-Identifier: Apache-2.0
"""Shows that this harness adds nothing of its own to what kvpress and transformers do."""

from __future__ import annotations

import random

import torch
from transformers import DynamicCache

from ems_vllm.eval.budget import Budget
from ems_vllm.eval.exchange import PromptLine
from peers.decode import Decoder
from peers.methods import Method
from peers.model import Model
from peers.prefill import Branch, prefill
from peers.presses import NAMES, PressOptions, build

_LENGTHS = (40, 333, 1000)
_MAX_TOKENS = 24
_BUDGETS = (24, 100)


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
    methods = [Method(name, Budget(count=length)) for name in NAMES]
    return [
        f"{method.press}, {length} tokens, nothing dropped: {line.output!r}, not {expected!r}"
        for method, line in model.answers(prompt, methods, seed=0)
        if line.output != expected
    ]


def _limited(model: Model, prompt: PromptLine, entries: int) -> list[str]:
    """Presses side by side leave the caches that each leaves alone, of the size asked for."""
    length = len(prompt.prompt_token_ids)
    options = PressOptions.of(entries, length, seed=0)
    presses = {name: build(name, options) for name in NAMES}
    together = prefill(model.model, prompt.prompt_token_ids, presses)
    failures = []
    for name in NAMES:
        cache = DynamicCache()
        with torch.inference_mode(), build(name, options)(model.model):
            input_ids = torch.tensor([prompt.prompt_token_ids], device=model.model.device)
            model.model(input_ids, past_key_values=cache)
        branch = together.branches[name]
        alone = [(layer.keys, layer.values) for layer in cache.layers]
        where = f"{name}, {length} tokens, {entries} entries"
        if not all(
            torch.equal(mine, theirs)
            for pair, other in zip(branch.layers, alone, strict=True)
            for mine, theirs in zip(pair, other, strict=True)
        ):
            failures.append(f"{where}: the cache is another one than under the press alone")
        # Rounding the layers of a pyramid moves its mean by less than an entry.
        if abs(branch.entries_per_head() - entries) >= (1 if name == "pyramidkv" else 0.001):
            failures.append(f"{where}: {branch.entries_per_head()} entries per kv_head")
    for name, branch in together.branches.items():
        if branch.shape is None and not _hides(model, length, branch):
            failures.append(f"{name}, {length} tokens, {entries} entries: hidden ones are seen")
    return failures


def _hides(model: Model, length: int, branch: Branch) -> bool:
    """Whether hidden entries have no share in what follows, whatever their values are."""
    poisoned = Branch(masked=branch.masked)
    for (keys, values), masked in zip(branch.layers, branch.masked, strict=True):
        changed = values.clone()
        if masked is not None:
            changed[masked] = 1e4
        poisoned.layers.append((keys, changed))
    token = [model.model.config.vocab_size // 2]
    logits = [Decoder(model.model, length, [b]).step(token) for b in (branch, poisoned)]
    return torch.equal(*logits)
