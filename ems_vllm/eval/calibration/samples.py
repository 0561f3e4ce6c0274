# SPDX-License-Identifier: Apache-2.0
"""What a model is shown: texts, random tokens, and facts of our own making."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.calibration.induction import NUM_PERIODS
from ems_vllm.eval.calibration.retrieval import Fact
from ems_vllm.eval.questions import random_words

if TYPE_CHECKING:
    from ems_vllm.eval.questions.tokenizer import Tokenizer

_FACT = "\n\nNote: the number of the {name} is {number}.\n\n"
_QUESTION = "\n\nNote: the number of the {name} is"
# Which of two numbers is asked for follows from what is said after them.
_FACTS = (
    "\n\nNote: the number of the {first} is {first_number}, that of the {second} is "
    "{second_number}. The {holder} has the {name}.\n\n"
)
_QUESTION_OF_HOLDER = "\n\nNote: the number of what the {holder} has is"
_SEED = 2412


def passages(texts: Sequence[Sequence[int]], count: int, length: int) -> list[list[int]]:
    """Parts of texts, as far from each other as there is room.

    Args:
        texts: Token ids.
        count: Of parts, spread over all texts, one after the other.
        length: Of a part.

    Raises:
        ConfigError: the texts hold too few tokens for one.
    """
    tokens = [token for text in texts for token in text]
    room = len(tokens) - length
    if room < 0:
        raise ConfigError(
            f"length={length} is not allowed: the texts hold {len(tokens)} tokens; give more text "
            "with --text-path, or lower it."
        )
    starts = dict.fromkeys(room * at // max(1, count - 1) for at in range(count))
    return [tokens[start : start + length] for start in starts]


def periods(
    tokens: Sequence[int], special: Sequence[int], count: int, length: int
) -> list[list[int]]:
    """Random tokens that are said NUM_PERIODS times.

    Args:
        tokens: To choose from: a text's, which a model knows.
        special: Tokens that begin a text.
        count: Of samples.
        length: Of one, at most.
    """
    known = sorted(set(tokens))
    rng = random.Random(_SEED)
    period = (length - len(special)) // NUM_PERIODS
    return [[*special, *(rng.choices(known, k=period) * NUM_PERIODS)] for _ in range(count)]


def facts(
    texts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    count: int,
    length: int,
    is_reasoned: bool = False,
) -> list[Fact]:
    """Numbers hidden in parts of texts, at depths from the beginning to the end.

    Args:
        texts: Token ids.
        tokenizer: The model's.
        count: Of facts.
        length: Tokens of a prompt and its answer.
        is_reasoned: Whether two numbers are told, and which is asked for has to be worked out.

    Raises:
        ConfigError: the texts are too short, or a number is written in other tokens where it is
            told than where it is asked for.
    """
    rng = random.Random(_SEED)
    special = tokenizer.encode_special()
    found = []
    parts = passages(texts, count, length)
    for at, part in enumerate(parts):
        *texts_of_fact, number = _reasoned(rng) if is_reasoned else _plain(rng)
        told, asked = (tokenizer.encode_plain(text) for text in texts_of_fact)
        answer = tokenizer.encode_plain(f" {number}")
        offset = _offset(told, answer)
        if offset is None:
            raise ConfigError(
                f"model's tokenizer writes {number!r} in other tokens within a sentence than after "
                "a space: calibrate by repetition, attention or induction instead."
            )
        room = length - len(special) - len(told) - len(asked) - len(answer)
        depth = room * at // max(1, len(parts) - 1)
        haystack = part[:room]
        prompt = [*special, *haystack[:depth], *told, *haystack[depth:], *asked]
        found.append(Fact(prompt, answer, len(special) + depth + offset))
    return found


def _plain(rng: random.Random) -> tuple[str, str, str]:
    """What is told, what asks for it, and the answer."""
    name, number = random_words.pair(rng), random_words.number(rng, 5)
    return _FACT.format(name=name, number=number), _QUESTION.format(name=name), number


def _reasoned(rng: random.Random) -> tuple[str, str, str]:
    """The same, in two steps, beside another number."""
    number = random_words.number(rng, 5)
    name, other, holder = (random_words.pair(rng) for _ in range(3))
    numbers = {name: number, other: random_words.number(rng, 5)}
    first, second = rng.sample([name, other], 2)
    told = _FACTS.format(
        first=first,
        first_number=numbers[first],
        second=second,
        second_number=numbers[second],
        holder=holder,
        name=name,
    )
    return told, _QUESTION_OF_HOLDER.format(holder=holder), number


def _offset(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where a sequence stands in another; None for nowhere."""
    for start in range(len(tokens) - len(wanted) + 1):
        if list(tokens[start : start + len(wanted)]) == list(wanted):
            return start
    return None
