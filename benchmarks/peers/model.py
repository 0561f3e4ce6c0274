# SPDX-License-Identifier: Apache-2.0
"""A transformers model that answers prompts under presses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ems_vllm.eval.reference.answer import (
    Vocabulary,
    answer_line,
    answer_together,
    answering,
)
from peers.decode import Decoder
from peers.prefill import prefill
from peers.presses import FULL, PressOptions, build

if TYPE_CHECKING:
    from kvpress import BasePress

    from ems_vllm.eval.exchange import AnswerLine, PromptLine
    from peers.methods import Method
    from peers.prefill import Branch


class Model:
    """A causal language model with sdpa attention, the one that all presses support.

    Args:
        name: Model folder.
        device: Of torch; "auto" is the GPU where there is one.
        dtype: Of torch; "auto" is the model's own.
    """

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto") -> None:
        disable_progress_bar()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation="sdpa",
        )
        self.model = model.to(device).eval()
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        self.vocabulary = Vocabulary(
            self._decode, {*configured, self._tokenizer.eos_token_id} - {None}
        )

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def answers(
        self, prompt: PromptLine, methods: Sequence[Method], seed: int
    ) -> Iterator[tuple[Method, AnswerLine]]:
        """Answers of several methods to one prompt, which is processed once for all of them."""
        if not methods:
            return
        presses = {method: self._press(method, prompt, seed) for method in methods}
        prefilled = prefill(self.model, prompt.prompt_token_ids, presses)
        for together in _groups(prefilled.branches):
            # Taken out: the branches of a long prompt are what memory holds.
            branches = [prefilled.branches.pop(method) for method in together]
            decoder = Decoder(self.model, prefilled.prompt_len, branches)
            running = [answering(prompt, prefilled.logits, self.vocabulary) for _ in together]
            try:
                lines = answer_together(running, decoder.step)
            # kvpress gives up where it finds no key to hide entries with.
            except ValueError as error:
                lines = [answer_line(prompt, error=str(error)) for _ in together]
            yield from zip(together, lines, strict=True)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _press(self, method: Method, prompt: PromptLine, seed: int) -> BasePress:
        # Any press keeps everything at ratio 0.
        name = "knorm" if method.press == FULL else method.press
        prompt_len = len(prompt.prompt_token_ids)
        entries = method.entries(prompt.budget_length, prompt_len)
        # Every prompt draws entries of its own.
        return build(name, PressOptions.of(entries, prompt_len, seed + prompt.index))


def _groups(branches: Mapping[Method, Branch]) -> list[list[Method]]:
    """Methods whose branches decode together; those that hide entries go alone."""
    groups: dict[Any, list[Method]] = {}
    for method, branch in branches.items():
        groups.setdefault(branch.shape or method, []).append(method)
    return list(groups.values())
