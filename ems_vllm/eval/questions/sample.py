# SPDX-License-Identifier: Apache-2.0
"""One question to a model, complete with what is needed to send it and to score the answer."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from ems_vllm.eval.questions.protocol import LAST, LATER, Protocol


@dataclass(frozen=True)
class Key:
    """What determines a sample, for a given model and given options.

    Samples that differ in `protocol` alone ask the same question about the same document.
    """

    task: str
    length: int
    seed: int
    index: int
    protocol: Protocol = LAST


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: Name in the registry of tasks.
        length: Nominal context length in tokens: the prompt and `max_tokens` fit into it.
        depth: Where the asked fact lies, 0 (start) to 1 (end); None where that has no meaning.
        seed, index: With task, length and protocol they determine everything else.
        prompt: Text as the model sees it, its special tokens and answer prefix included; empty
            for a conversation.
        prompt_token_ids: The same as token ids, which is what is sent; empty for a conversation.
        max_tokens: Tokens to generate at most.
        references: Right answers; which of them count is up to the metric.
        stop: Texts that end the answer.
        choices: Classes to choose from, for metrics that need them.
        turns: What the user says in each turn of a conversation; the answer to the last one is
            scored.
        written_token_ids: What the model is made to write after the prompt, before its answer: a
            long list that is compressed on the way, or the question, where the protocol is "later".
        continuation_token_ids: For teacher forcing, the tokens that follow the prompt.
        continuation_bytes: Length of their text in UTF-8.
        natural_length: Tokens of prompt and answer where there was not enough to fill `length`.
        protocol: Where the question stands.
        gold_token_ids: The first reference as the tokens that the model would write it with, for
            the loss of the right answer; empty where a task has no single right answer.
        lead_token_ids: How a right answer begins that the prompt has not begun, before
            gold_token_ids; where the protocol is "first", which ends in `Answer:` or the like.
        follows_full: The full cache's own greedy answer is the reference; it has to be made first.
    """

    task: str
    length: int
    depth: float | None
    seed: int
    index: int
    prompt: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    references: tuple[str, ...]
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    written_token_ids: tuple[int, ...] = ()
    continuation_token_ids: tuple[int, ...] = ()
    continuation_bytes: int = 0
    natural_length: int | None = None
    protocol: Protocol = LAST
    gold_token_ids: tuple[int, ...] = ()
    lead_token_ids: tuple[int, ...] = ()
    follows_full: bool = False

    @property
    def budget_length(self) -> int:
        """Tokens that a budget's fraction is a fraction of."""
        return self.length if self.natural_length is None else self.natural_length

    @property
    def key(self) -> Key:
        return Key(self.task, self.length, self.seed, self.index, self.protocol)

    @property
    def compresses_writing(self) -> bool:
        """Whether the context is what the model writes, and not its prompt."""
        return bool(self.written_token_ids) and self.protocol != LATER


def generator(key: Key, purpose: str = "") -> random.Random:
    """Random numbers of one sample, the same whatever else is drawn, and in whichever order.

    They do not depend on the protocol.

    Args:
        key: Of the sample.
        purpose: Tells several generators of one sample apart.
    """
    text = f"{key.task}|{key.length}|{key.seed}|{key.index}|{purpose}"
    digest = hashlib.sha256(text.encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
