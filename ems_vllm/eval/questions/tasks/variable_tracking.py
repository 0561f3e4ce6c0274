# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking (arXiv 2404.06654): follow a chain of assignments through noise."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from ems_vllm.eval.questions.haystack import NOISE, insert_at_depths
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_NUM_HOPS = 4


@TASKS.register("vt")
class VariableTracking(Task):
    """One chain of four hops in noise, after a worked example, as in RULER.

    Deviation: the example has at most ten lines of noise and fewer in short contexts, where RULER's
    would take most of the room.
    """

    max_tokens = 30

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        example_names, names = _names(rng, 3), _names(rng, 5)
        example_value, value = (str(rng.randrange(10000, 100000)) for _ in range(2))
        example_lines = _lines(rng, example_names, example_value, min(10, key.length // 400))
        example = _question(example_lines, example_value)
        shown = f"{example.body}{example.answer_prefix} {' '.join(example_names)}\n\n"
        places = sorted(rng.random() for _ in names)

        def build(size: int) -> Question:
            chain = _chain(names, value)
            lines = insert_at_depths([NOISE] * size, chain, places)
            question = _question(lines, value)
            return replace(
                question,
                instruction=shown + question.instruction,
                references=tuple(names),
                gold=" ".join(names),
            )

        return self.fitted(key, tokenizer, build, minimum=1)


def _names(rng: random.Random, num_letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) <= _NUM_HOPS:
        names["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=num_letters))] = None
    return list(names)


def _chain(names: Sequence[str], value: str) -> list[str]:
    first = f"VAR {names[0]} = {value}"
    return [first, *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))]


def _lines(rng: random.Random, names: Sequence[str], value: str, num_noise: int) -> list[str]:
    depths = sorted(rng.random() for _ in names)
    return insert_at_depths([NOISE] * num_noise, _chain(names, value), depths)


def _question(lines: Sequence[str], value: str) -> Question:
    return Question(
        instruction="Memorize and track the chain(s) of variable assignment hidden in the "
        "following text.\n\n",
        document="\n".join(lines),
        question=f"\nQuestion: Find all variables that are assigned the value {value} in the "
        "text above.",
        answer_prefix=" Answer: According to the chain(s) of variable assignment in the text "
        f"above, {_NUM_HOPS + 1} variables are assigned the value {value}, they are: ",
    )
