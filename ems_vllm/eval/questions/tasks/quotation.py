# SPDX-License-Identifier: Apache-2.0
"""Extraction from any text: how a sentence of the document goes on. Ours.

What the user's own documents are measured with (`text_path`): no questions have to be written for
them, and a model without instruction tuning can do it.
"""

from __future__ import annotations

from ems_vllm.eval.questions.haystack import essay, essay_words
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_GIVEN = 10
_ASKED = 6


@TASKS.register("quotation")
class Quotation(Task):
    """Ten words of the document are given, the next six are asked; the place goes through the grid.

    The score is the share of the six words that come in order before one is wrong. A model that
    knows the text by heart does not need the document.
    """

    metric = "leading_words"
    max_tokens = 24

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        text = essay_words(self.options.text_path)
        start = rng.randrange(len(text))
        depth = self.options.depths[key.index % len(self.options.depths)]

        def build(size: int) -> Question:
            document = " ".join(essay(text, start, size))
            listed = document.split()
            place = round(depth * (len(listed) - _GIVEN - _ASKED))
            given = " ".join(listed[place : place + _GIVEN])
            asked = " ".join(listed[place + _GIVEN : place + _GIVEN + _ASKED])
            return Question(
                instruction="Read the following text. A passage of it will be quoted.\n\n",
                document=document,
                question="\n\nQuote a passage from the text above, word for word.",
                # Not in the question as well: the answer would go on as the question does.
                answer_prefix=f'\n\n"{given}',
                ahead="In the following text, find the passage that begins with these words: "
                f'"{given}". How does it go on?',
                neutral_prefix="The passage goes on:",
                references=(asked,),
                depth=depth,
            )

        return self.fitted(key, tokenizer, build, minimum=_GIVEN + _ASKED)
