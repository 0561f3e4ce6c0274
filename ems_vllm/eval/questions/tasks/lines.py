# SPDX-License-Identifier: Apache-2.0
"""Line retrieval of LongEval (Li et al., LongChat, 2023): a register's content by its line."""

from __future__ import annotations

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer


@TASKS.register("lines")
class Lines(Task):
    """The number in one of as many lines as fit; its depth goes through the grid.

    Deviation: the answer is begun for the model, so that models without instruction tuning can be
    measured. As in LongEval, the first number of the answer counts.
    """

    metric = "first_number"
    max_tokens = 32

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        depth = self.options.depths[key.index % len(self.options.depths)]

        def build(size: int) -> Question:
            rng = generator(key)
            names: dict[str, str] = {}
            while len(names) < size:
                name = random_words.pair(rng)
                # There are some hundred thousand pairs; long records need more.
                if name in names:
                    name = f"{name}-{len(names)}"
                names[name] = str(rng.randrange(1, 50000))
            asked = next(iter(names))
            listed = list(names)[1:]
            listed.insert(round(depth * len(listed)), asked)
            record = "\n".join(f"line {n}: REGISTER_CONTENT is <{names[n]}>" for n in listed)
            return Question(
                instruction="Below is a record of lines I want you to remember. Each line begins "
                "with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the "
                "line as a numerical value. For each line index, memorize its corresponding "
                "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the "
                "corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:"
                "\n\n",
                document=record,
                question="\n\nNow the record is over. Tell me what is the <REGISTER_CONTENT> "
                f"in line {asked}? I need the number.",
                answer_prefix=f"\nThe <REGISTER_CONTENT> in line {asked} is",
                references=(names[asked],),
                depth=depth,
                gold=f" <{names[asked]}>",
            )

        return self.fitted(key, tokenizer, build, minimum=2)
