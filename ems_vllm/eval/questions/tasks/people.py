# SPDX-License-Identifier: Apache-2.0
"""Questions about people of whom the text says a sentence each. Ours."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.haystack import essay, essay_words, insert_at_depths
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_FIRST_NAMES = """
Ada Albert Alice Anna Arthur Bella Carl Clara Daniel David Edith Edward Ella Emma Felix Frank
George Grace Hannah Harry Helen Henry Ida Jack James Jane John Julia Karl Kate Laura Leo Lucy
Mark Martha Mary Max Nora Oscar Paul Peter Rosa Ruth Sarah Simon Sophie Thomas Walter William
"""
_TRADE_NAMES = """
baker banker barber brewer butcher carpenter clerk cook dentist doctor farmer fisherman
gardener hunter jeweller judge lawyer librarian mason miller miner musician nurse painter
pilot plumber poet potter printer sailor sculptor shepherd smith soldier surgeon tailor
teacher weaver writer
"""
_FIRST = tuple(_FIRST_NAMES.split())
_TRADES = tuple(_TRADE_NAMES.split())
_NUM_OTHERS = 3
_ENDINGS = ("bridge", "burg", "dale", "field", "ford", "ham", "hill", "mouth", "port", "ton")


@dataclass(frozen=True)
class _Person:
    name: str
    trade: str
    town: str
    year: int

    @classmethod
    def draw(cls, rng: random.Random) -> _Person:
        adjective = rng.choice(random_words.ADJECTIVES)
        family = f"{adjective}{rng.choice(('man', 'ley', 'son', 'well', 'er'))}"
        return cls(
            name=f"{rng.choice(_FIRST)} {family.capitalize()}",
            trade=rng.choice(_TRADES),
            town=f"{rng.choice(random_words.NOUNS)}{rng.choice(_ENDINGS)}".capitalize(),
            year=rng.randrange(1800, 2000),
        )

    def __str__(self) -> str:
        return (
            f"{self.name} was born in the year {self.year} in the town of {self.town} and worked "
            f"as a {self.trade}."
        )


@TASKS.register("people")
class People(Task):
    """The town, the trade or the year of birth of one of four people, in prose.

    The other three sentences look the same, so that they compete.
    """

    metric = "string_match_all"
    max_tokens = 32

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        asked = _Person.draw(rng)
        what = rng.choice(("town", "trade", "year"))
        question, prefix, answer = {
            "town": (
                f"In which town was {asked.name} born?",
                f" {asked.name} was born in the town of",
                asked.town,
            ),
            "trade": (
                f"What did {asked.name} work as?",
                f" {asked.name} worked as a",
                asked.trade,
            ),
            "year": (
                f"In which year was {asked.name} born?",
                f" {asked.name} was born in the year",
                str(asked.year),
            ),
        }[what]
        depth = self.options.depths[key.index % len(self.options.depths)]

        others = [_Person.draw(rng) for _ in range(_NUM_OTHERS)]
        sentences = [str(asked), *(str(person) for person in others if person.name != asked.name)]
        depths = [depth, *(rng.random() for _ in sentences[1:])]
        text = essay_words(self.options.text_path)
        start = rng.randrange(len(text))

        def build(size: int) -> Question:
            document = " ".join(insert_at_depths(essay(text, start, size), sentences, depths))
            return Question(
                instruction="Read the following text. I will ask about the people in it.\n\n",
                document=document,
                question=f"\n\nQuestion: {question}\nAnswer:",
                answer_prefix=prefix,
                references=(answer,),
                depth=depth,
            )

        return self.fitted(key, tokenizer, build, minimum=1)
