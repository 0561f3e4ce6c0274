# SPDX-License-Identifier: Apache-2.0
"""RULER's aggregation tasks (arXiv 2404.06654): which words are common, which are frequent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_NUM_COMMON = 10
_LONG = 4096


@TASKS.register("cwe")
class CommonWords(Task):
    """Ten words of a numbered list come 30 times, the others 3 times; 6 and 1 below 4,096 tokens.

    A worked example precedes, as in RULER; the words are ours.
    """

    max_tokens = 120

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        is_long = key.length >= _LONG
        repeats, example_repeats = ((30, 3), (10, 3)) if is_long else ((6, 1), (3, 1))
        rng = generator(key)
        example_words = random_words.words(rng, 40 if is_long else 20)
        listed = _numbered(_repeated(rng, example_words, *example_repeats))
        shown = _common_question(listed)
        answer = _numbered(example_words[:_NUM_COMMON])
        example = f"{shown.body}{shown.answer_prefix} {answer}\n"

        def build(size: int) -> Question:
            own = generator(key, "list")
            chosen = random_words.words(own, size)
            question = _common_question(_numbered(_repeated(own, chosen, *repeats)))
            common = chosen[:_NUM_COMMON]
            return replace(
                question,
                instruction=example + question.instruction,
                references=tuple(common),
                gold=f" {_numbered(common)}",
            )

        return self.fitted(key, tokenizer, build, minimum=_NUM_COMMON + 1)


@TASKS.register("fwe")
class FrequentWords(Task):
    """The three most frequent of coded words whose frequencies follow a zeta distribution.

    As in RULER: six letters a word, exponent 2, and the most frequent "word" is three dots.
    """

    max_tokens = 50

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        vocabulary: dict[str, None] = {"...": None}
        while len(vocabulary) < max(key.length // 50, 8):
            vocabulary[random_words.letters(rng, 6)] = None
        coded = list(vocabulary)
        zeta = sum(k**-2.0 for k in range(1, 10**5))

        def build(size: int) -> Question:
            counts = [int(size * k**-2.0 / zeta) for k in range(1, len(coded) + 1)]
            text = [w for w, count in zip(coded, counts, strict=True) for _ in range(count)]
            generator(key, "order").shuffle(text)
            return Question(
                instruction="Read the following coded text and track the frequency of each coded "
                "word. Find the three most frequently appeared coded words. ",
                document=" ".join(text),
                question="\nQuestion: Do not provide any explanation. Please ignore the dots "
                "'....'. What are the three most frequently appeared words in the above coded "
                "text?",
                answer_prefix=" Answer: According to the coded text above, the three most "
                "frequently appeared words are:",
                references=tuple(coded[1:4]),
                gold=f" {' '.join(coded[1:4])}",
            )

        # From here on ranks two to five have different counts.
        return self.fitted(key, tokenizer, build, minimum=50)


def _repeated(rng: random.Random, chosen: Sequence[str], common: int, uncommon: int) -> list[str]:
    listed = [*chosen[:_NUM_COMMON]] * common + [*chosen[_NUM_COMMON:]] * uncommon
    rng.shuffle(listed)
    return listed


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))


def _common_question(listed: str) -> Question:
    return Question(
        instruction="Below is a numbered list of words. In these words, some appear more often "
        "than others. Memorize the ones that appear most often.\n",
        document=listed,
        question="\nQuestion: What are the 10 most common words in the above list?",
        answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
    )
