# SPDX-License-Identifier: Apache-2.0
"""From a model that gives one step at a time to an answer, ended as vLLM ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.records.following import NUM_TOP, FullAnswer, follow
from ems_vllm.eval.records.prompt_files import AnswerLine

if TYPE_CHECKING:
    import torch

    from ems_vllm.eval.records.prompt_files import PromptLine


@dataclass(frozen=True)
class Vocabulary:
    """What ending and writing an answer needs of a tokenizer.

    Attributes:
        decode: Text of token ids, without special tokens.
        eos_token_ids: Tokens that end an answer.
    """

    decode: Callable[[Sequence[int]], str]
    eos_token_ids: Collection[int]


Answering = Generator[int, "torch.Tensor", AnswerLine]
"""Asks for the next step with a token, is sent the logits after it, and returns the answer."""


def predicted(
    prompt: PromptLine,
    first_logits: torch.Tensor,
    extend: Callable[[Sequence[int]], torch.Tensor],
) -> AnswerLine:
    """Answer a prompt by teacher forcing, with all tokens of its continuation at once.

    Args:
        prompt: With a continuation.
        first_logits: [vocabulary] - after the last token of the prompt.
        extend: Takes tokens that follow the prompt and gives the logits after each of them,
            [num_tokens, vocabulary].
    """
    token_ids = prompt.continuation_token_ids
    logprobs = [_logprob(first_logits, token_ids[0])]
    if len(token_ids) > 1:
        logprobs += map(_logprob, extend(token_ids[:-1]), token_ids[1:])
    return answer_line(prompt, logprobs=tuple(logprobs))


def answering(prompt: PromptLine, first_logits: torch.Tensor, vocabulary: Vocabulary) -> Answering:
    """Answer a prompt that has been processed, greedily or by teacher forcing.

    What is written after the prompt, such as a question that comes later, goes first.

    Args:
        prompt: What is asked.
        first_logits: [vocabulary] - after the last token of the prompt.
        vocabulary: Of the model.
    """
    if prompt.follows_full:
        raise ConfigError(
            f"tasks={prompt.task!r} follows the full cache's answer, which this engine does not "
            "make: leave the task out."
        )
    if prompt.continuation_token_ids:
        logprobs = yield from _predicting(prompt.continuation_token_ids, first_logits)
        return answer_line(prompt, logprobs=logprobs)
    logits = first_logits
    # Step by step, as an engine generates what is prescribed.
    for token_id in prompt.written_token_ids:
        logits = yield token_id
    token_ids: list[int] = []
    while True:
        token_ids.append(int(logits.argmax()))
        text, is_stopped = cut(vocabulary.decode(token_ids), prompt.stop)
        if (
            is_stopped
            or token_ids[-1] in vocabulary.eos_token_ids
            or len(token_ids) >= prompt.max_tokens
        ):
            return answer_line(prompt, output=text)
        logits = yield token_ids[-1]


def recording(
    prompt: PromptLine, first_logits: torch.Tensor, vocabulary: Vocabulary
) -> Generator[int, torch.Tensor, FullAnswer]:
    """Answer a prompt greedily with the full cache, for other methods to follow."""
    logits = first_logits
    for token_id in prompt.written_token_ids:
        logits = yield token_id
    token_ids: list[int] = []
    tops: list[dict[int, float]] = []
    while True:
        tops.append(_top(logits))
        token_ids.append(int(logits.argmax()))
        if token_ids[-1] in vocabulary.eos_token_ids or len(token_ids) >= prompt.max_tokens:
            return FullAnswer(token_ids=tuple(token_ids), tops=tuple(tops))
        logits = yield token_ids[-1]


def following(
    prompt: PromptLine, first_logits: torch.Tensor, full: FullAnswer, vocabulary: Vocabulary
) -> Answering:
    """Predict the full cache's answer, token by token."""
    logits = first_logits
    for token_id in prompt.written_token_ids:
        logits = yield token_id
    tops = [_top(logits)]
    for token_id in full.token_ids[:-1]:
        logits = yield token_id
        tops.append(_top(logits))
    followed = follow(full, tops)
    text = vocabulary.decode(full.token_ids[: followed.num_same])
    return answer_line(prompt, output=text, followed=followed)


def _top(logits: torch.Tensor) -> dict[int, float]:
    values, token_ids = logits.float().log_softmax(-1).topk(min(NUM_TOP, len(logits)))
    return dict(zip(token_ids.tolist(), values.tolist(), strict=True))


def _predicting(
    token_ids: Sequence[int], first_logits: torch.Tensor
) -> Generator[int, torch.Tensor, tuple[float, ...]]:
    """Natural logarithm of the probability of each of the given tokens, one after the other."""
    logits = first_logits
    logprobs = []
    for index, token_id in enumerate(token_ids):
        if index > 0:
            logits = yield token_ids[index - 1]
        logprobs.append(_logprob(logits, token_id))
    return tuple(logprobs)


def _logprob(logits: torch.Tensor, token_id: int) -> float:
    return float(logits.float().log_softmax(-1)[token_id])


def answer_together(
    answers: Sequence[Answering], step: Callable[[list[int]], torch.Tensor]
) -> list[AnswerLine]:
    """Run answers side by side until all are finished.

    Args:
        answers: Not started.
        step: Takes the next token of every answer and gives the logits after it,
            [num_answers, vocabulary]. A finished answer repeats its last token.
    """
    tokens = [0] * len(answers)
    lines: dict[int, AnswerLine] = {}
    logits: Sequence[torch.Tensor] | torch.Tensor | None = None
    while len(lines) < len(answers):
        for index, answer in enumerate(answers):
            if index not in lines:
                try:
                    tokens[index] = next(answer) if logits is None else answer.send(logits[index])
                except StopIteration as finished:
                    lines[index] = finished.value
        if len(lines) < len(answers):
            logits = step(tokens)
    return [lines[index] for index in range(len(answers))]


def generated(first_logits: torch.Tensor, step: Callable[[int], torch.Tensor]) -> Iterator[int]:
    """Greedy tokens without an end; a step is taken only for a token that is asked for."""
    logits = first_logits
    while True:
        token_id = int(logits.argmax())
        yield token_id
        logits = step(token_id)


def answer_line(prompt: PromptLine, **fields: Any) -> AnswerLine:
    """The answer to a prompt, given what is in it."""
    return AnswerLine(
        task=prompt.task,
        length=prompt.length,
        seed=prompt.seed,
        index=prompt.index,
        protocol=prompt.protocol,
        prompt_tokens=len(prompt.prompt_token_ids),
        **fields,
    )


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of its stop texts, and whether there is one."""
    found = [at for at in (text.find(word) for word in stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)
