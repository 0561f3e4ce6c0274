# SPDX-License-Identifier: Apache-2.0
"""From a model that gives one step at a time to an answer, ended as vLLM ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.eval.exchange import AnswerLine

if TYPE_CHECKING:
    import torch

    from ems_vllm.eval.exchange import PromptLine


@dataclass(frozen=True)
class Vocabulary:
    """What ending and writing an answer needs of a tokenizer.

    Attributes:
        decode: Text of token ids, without special tokens.
        eos_token_ids: Tokens that end an answer.
    """

    decode: Callable[[Sequence[int]], str]
    eos_token_ids: Collection[int]


def answer(
    prompt: PromptLine,
    first_logits: torch.Tensor,
    step: Callable[[int], torch.Tensor],
    vocabulary: Vocabulary,
) -> AnswerLine:
    """Answer a prompt that has been processed, greedily or by teacher forcing.

    Args:
        prompt: What is asked.
        first_logits: [vocabulary] - after the last token of the prompt.
        step: Takes the next token and gives the logits after it.
        vocabulary: Of the model.
    """
    if prompt.continuation_token_ids:
        logprobs = tuple(predicted(prompt.continuation_token_ids, first_logits, step))
        return answer_line(prompt, logprobs=logprobs)
    token_ids: list[int] = []
    for token_id in generated(first_logits, step):
        token_ids.append(token_id)
        text, is_stopped = cut(vocabulary.decode(token_ids), prompt.stop)
        if (
            is_stopped
            or token_id in vocabulary.eos_token_ids
            or len(token_ids) >= prompt.max_tokens
        ):
            break
    return answer_line(prompt, output=text)


def answer_line(prompt: PromptLine, **fields: Any) -> AnswerLine:
    """The answer to a prompt, given what is in it."""
    return AnswerLine(
        task=prompt.task,
        length=prompt.length,
        seed=prompt.seed,
        index=prompt.index,
        prompt_tokens=len(prompt.prompt_token_ids),
        **fields,
    )


def generated(first_logits: torch.Tensor, step: Callable[[int], torch.Tensor]) -> Iterator[int]:
    """Greedy tokens without an end; a step is taken only for a token that is asked for."""
    logits = first_logits
    while True:
        token_id = int(logits.argmax())
        yield token_id
        logits = step(token_id)


def predicted(
    token_ids: Sequence[int], first_logits: torch.Tensor, step: Callable[[int], torch.Tensor]
) -> Iterator[float]:
    """Natural logarithm of the probability of each of the given tokens, one after the other."""
    logits = first_logits
    for index, token_id in enumerate(token_ids):
        if index > 0:
            logits = step(token_ids[index - 1])
        yield float(logits.float().log_softmax(-1)[token_id])


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of its stop texts, and whether there is one."""
    found = [at for at in (text.find(word) for word in stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)
