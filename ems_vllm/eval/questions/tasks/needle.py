# SPDX-License-Identifier: Apache-2.0
"""Needles in a haystack, written as RULER writes them (arXiv 2404.06654).

Deviations from RULER's own generator: words for keys come from our lists; the essay haystack is a
public-domain novel, or the user's text, and each sample starts at a word of its own instead of the
first one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.haystack import NOISE, essay, essay_words, insert_at_depths
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

Kind = Literal["words", "numbers", "uuids", "phrases"]
_MAKE: dict[Kind, Callable[[random.Random], str]] = {
    "words": random_words.pair,
    "numbers": random_words.number,
    "uuids": random_words.identifier,
    "phrases": random_words.phrase,
}

_EXAMPLE_WORDS = 60


class NeedleTask(Task):
    """Asks for the values of some keys, each stated once somewhere in the haystack.

    Attributes:
        haystack: "noise" repeats one phrase, "essay" is prose, "needle" is other needles.
        key_kind, value_kind: What keys and values look like.
        num_digits: Of values that are numbers.
        num_keys: Keys in the haystack, the asked ones included.
        num_values: Values of every key.
        num_queries: Keys that are asked.
        is_near: Keys share their first word, so that needles differ in little.
        has_example: The document begins with a worked example, another needle and its answer.
        is_grid: Take the depth from the options in turn, instead of a random one.
    """

    max_tokens = 128
    haystack: ClassVar[Literal["noise", "essay", "needle"]] = "essay"
    key_kind: ClassVar[Kind] = "words"
    value_kind: ClassVar[Kind] = "numbers"
    num_digits: ClassVar[int] = 7
    num_keys: ClassVar[int] = 1
    num_values: ClassVar[int] = 1
    num_queries: ClassVar[int] = 1
    is_near: ClassVar[bool] = False
    has_example: ClassVar[bool] = False
    is_grid: ClassVar[bool] = False

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        facts = self._facts(rng)
        queried = rng.sample(list(facts), self.num_queries)
        needles = [self._needle(name, v) for name, values in facts.items() for v in values]
        rng.shuffle(needles)
        depths = self._depths(key, rng, len(needles))
        start = rng.randrange(2**30)
        example = self._example(key, start) if self.has_example else ""

        def build(size: int) -> Question:
            units, separator = self._haystack(key, start, size)
            context = example + separator.join(insert_at_depths(units, needles, depths))
            answers = tuple(v for name in queried for v in facts[name])
            return self._question(context, queried, answers, depths[0] if self.is_grid else None)

        return self.fitted(key, tokenizer, build, minimum=1)

    def _facts(self, rng: random.Random) -> dict[str, list[str]]:
        facts: dict[str, list[str]] = {}
        first = rng.choice(random_words.ADJECTIVES) if self.is_near else None
        while len(facts) < self.num_keys:
            values = [self._value(rng) for _ in range(self.num_values)]
            name = _MAKE[self.key_kind](rng) if first is None else random_words.pair(rng, first)
            facts[name] = values
        return facts

    def _value(self, rng: random.Random) -> str:
        if self.value_kind == "numbers":
            return random_words.number(rng, self.num_digits)
        return _MAKE[self.value_kind](rng)

    def _example(self, key: Key, start: int) -> str:
        """Another needle with some text, its question and its answer."""
        rng = generator(key, "example")
        name, value = _MAKE[self.key_kind](rng), self._value(rng)
        units, separator = self._haystack(key, start + 2**20, _EXAMPLE_WORDS)
        context = separator.join(insert_at_depths(units, [self._needle(name, value)], [0.5]))
        asked = self._question(context, [name], (value,), None)
        return f"{asked.body}{asked.answer_prefix}{asked.gold_text}.\n\n"

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_kind} for {key} is: {value}."

    def _depths(self, key: Key, rng: random.Random, count: int) -> list[float]:
        if self.is_grid:
            return [self.options.depths[key.index % len(self.options.depths)]]
        # RULER's 40 depths; no two needles share one as long as there are enough.
        grid = [i / 39 for i in range(40)]
        return rng.sample(grid, count) if count <= len(grid) else rng.choices(grid, k=count)

    def _haystack(self, key: Key, start: int, size: int) -> tuple[list[str], str]:
        if self.haystack == "noise":
            return [NOISE] * size, "\n"
        if self.haystack == "essay":
            text = essay_words(self.options.text_path)
            return essay(text, start % len(text), size), " "
        rng = generator(key, "haystack")
        make_key = _MAKE[self.key_kind]
        return [self._needle(make_key(rng), self._value(rng)) for _ in range(size)], "\n"

    def _question(
        self, context: str, keys: Sequence[str], answers: tuple[str, ...], depth: float | None
    ) -> Question:
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        is_one = len(answers) == 1
        kind = self.value_kind.removesuffix("s") if is_one else self.value_kind
        some, be, which = ("A", "is", "What is") if is_one else ("Some", "are", "What are all")
        asked = f"the special magic {kind} for {query} mentioned in the provided text"
        return Question(
            instruction=f"{some} special magic {kind} {be} hidden within the following text. Make "
            f"sure to memorize it. I will quiz you about the {kind} afterwards.\n",
            document=context,
            question=f"\n{which} {asked}?",
            answer_prefix=f" {asked[0].upper()}{asked[1:]} {be}",
            references=answers,
            depth=depth,
            gold=f" {', '.join(answers)}",
        )


@TASKS.register("niah")
class NeedleGrid(NeedleTask):
    """One needle at a chosen depth: the grid of depth and length that heat maps show."""

    is_grid = True


@TASKS.register("niah_single_1")
class NiahSingle1(NeedleTask):
    haystack = "noise"


@TASKS.register("niah_single_2")
class NiahSingle2(NeedleTask):
    pass


@TASKS.register("niah_single_3")
class NiahSingle3(NeedleTask):
    value_kind = "uuids"


@TASKS.register("niah_multikey_1")
class NiahMultikey1(NeedleTask):
    num_keys = 4


@TASKS.register("niah_multikey_2")
class NiahMultikey2(NeedleTask):
    haystack = "needle"


@TASKS.register("niah_multikey_3")
class NiahMultikey3(NeedleTask):
    haystack = "needle"
    key_kind = "uuids"
    value_kind = "uuids"


@TASKS.register("niah_multivalue")
class NiahMultivalue(NeedleTask):
    num_values = 4


@TASKS.register("niah_multiquery")
class NiahMultiquery(NeedleTask):
    num_keys = 4
    num_queries = 4


# Beside RULER's: what models can do that are too small for seven digits or four values.


@TASKS.register("niah_digits_3")
class NiahDigits3(NeedleTask):
    num_digits = 3


@TASKS.register("niah_digits_4")
class NiahDigits4(NeedleTask):
    num_digits = 4


@TASKS.register("niah_digits_5")
class NiahDigits5(NeedleTask):
    num_digits = 5


@TASKS.register("niah_words")
class NiahWords(NeedleTask):
    value_kind = "words"


@TASKS.register("niah_phrases")
class NiahPhrases(NeedleTask):
    value_kind = "phrases"


@TASKS.register("niah_multivalue_2")
class NiahMultivalue2(NeedleTask):
    num_digits = 4
    num_values = 2


@TASKS.register("niah_near")
class NiahNear(NeedleTask):
    """One of five needles whose keys share their first word."""

    num_digits = 5
    num_keys = 5
    is_near = True


@TASKS.register("niah_example")
class NiahExample(NeedleTask):
    """A worked example with another number comes first.

    What the answer looks like occurs twice. A cache that lost the needle answers with the example.
    """

    num_digits = 5
    has_example = True
