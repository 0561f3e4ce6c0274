# SPDX-License-Identifier: Apache-2.0
"""A transformers model that answers prompts under presses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ems_vllm.eval.transformers_engine.answer import (
    Vocabulary,
    answer_line,
    answer_together,
    answering,
)
from peers.attention import IMPLEMENTATION
from peers.budgets import WINDOW, entries_kept
from peers.decode import Decoder
from peers.forcing import forced_logprobs
from peers.layers import sliding_windows
from peers.prefill import prefill
from peers.presses import WITHOUT_SLIDING_WINDOWS, PressOptions, build

if TYPE_CHECKING:
    from kvpress import BasePress

    from ems_vllm.eval.records.method import Method
    from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine
    from peers.prefill import Prefilled
    from peers.scorers import Memo

# Answers that decode side by side at most.
_MAX_TOGETHER = 16


class Model:
    """A causal language model with sdpa attention, the one that all presses support.

    Args:
        name: Model folder.
        device: Of torch; "auto" is the GPU where there is one.
        dtype: Of torch; "auto" is the model's own.
        window: Observation window of presses that have one.

    Attributes:
        model: Of transformers.
        vocabulary: Of its tokenizer.
        seconds: What each press took so far, and under "prefill" what all of them share.
    """

    def __init__(
        self, name: str, device: str = "auto", dtype: str = "auto", window: int = WINDOW
    ) -> None:
        self._window = window
        disable_progress_bar()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=IMPLEMENTATION,
        )
        self.model = model.to(device).eval()
        self.seconds: Counter[str] = Counter()
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        self.vocabulary = Vocabulary(
            self._decode, {*configured, self._tokenizer.eos_token_id} - {None}
        )

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def supports(self, press: str) -> bool:
        """Whether a press can compress this model."""
        has_windows = any(window is not None for window in sliding_windows(self.model))
        return not has_windows or press not in WITHOUT_SLIDING_WINDOWS

    def answers(
        self, prompt: PromptLine, methods: Sequence[Method], seed: int, teacher_forced: bool = False
    ) -> Iterator[tuple[Method, AnswerLine]]:
        """Answers of several methods to one prompt, which is processed once for all of them.

        Args:
            prompt: What is asked. What its model is made to write first is read in one step after
                the prompt has been compressed, at its true positions.
            methods: Presses at budgets.
            seed: Of presses that draw.
            teacher_forced: Whether answers have `gold_logprobs` beside their text.
        """
        if not methods:
            return
        memo: Memo = {}
        presses = {method: self._press(method, prompt, seed, memo) for method in methods}
        prefilled = prefill(self.model, prompt.prompt_token_ids, presses)
        self.seconds["prefill"] += prefilled.prefill_seconds
        for method, seconds in prefilled.seconds.items():
            self.seconds[method.name] += seconds
        lengths = {method: branch.longest for method, branch in prefilled.branches.items()}
        for together in groups(lengths):
            yield from zip(
                together, self._answer(prompt, prefilled, together, teacher_forced), strict=True
            )

    def _answer(
        self,
        prompt: PromptLine,
        prefilled: Prefilled,
        methods: Sequence[Method],
        teacher_forced: bool,
    ) -> list[AnswerLine]:
        # Taken out: the branches of a long prompt are what memory holds.
        decoder = Decoder(self.model, [prefilled.branches.pop(method) for method in methods])
        logits = prefilled.logits.expand(len(methods), -1)
        if prompt.written_token_ids:
            written = [list(prompt.written_token_ids)] * len(methods)
            logits = decoder.extend(written, logits_to_keep=1)[:, -1]
        if prompt.continuation_token_ids:
            logprobs = forced_logprobs(decoder, logits, prompt.continuation_token_ids)
            return [answer_line(prompt, logprobs=row) for row in logprobs]
        gold: list[tuple[float, ...]] | None = None
        if teacher_forced and prompt.gold_token_ids:
            num_new = decoder.num_new
            after_lead = logits
            if prompt.lead_token_ids:
                lead = [list(prompt.lead_token_ids)] * len(methods)
                after_lead = decoder.extend(lead, logits_to_keep=1)[:, -1]
            gold = forced_logprobs(decoder, after_lead, prompt.gold_token_ids)
            decoder.rewind(num_new)
        # What was to be written has been.
        rest = prompt.model_copy(update={"written_token_ids": ()})
        running = [answering(rest, row, self.vocabulary) for row in logits]
        lines = answer_together(running, decoder.step)
        if gold is None:
            return lines
        return [
            line.model_copy(update={"gold_logprobs": row})
            for line, row in zip(lines, gold, strict=True)
        ]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _press(self, method: Method, prompt: PromptLine, seed: int, memo: Memo) -> BasePress:
        # Any press keeps everything at ratio 0.
        name = "knorm" if method.is_full else method.name
        prompt_len = len(prompt.prompt_token_ids)
        entries = entries_kept(method.budget.total(prompt.budget_length), prompt_len)
        # Every prompt draws entries of its own.
        return build(
            name, PressOptions(entries, prompt_len, seed + prompt.index, memo, self._window)
        )


def groups(lengths: Mapping[Method, int]) -> list[list[Method]]:
    """Methods that decode side by side: few enough, and padded to at most twice their length.

    Args:
        lengths: Entries that a method has to pad at least to.
    """
    grouped: list[list[Method]] = []
    for method in sorted(lengths, key=lambda method: lengths[method]):
        group = grouped[-1] if grouped else None
        if group and len(group) < _MAX_TOGETHER and lengths[method] <= 2 * lengths[group[0]]:
            group.append(method)
        else:
            grouped.append([method])
    return grouped
