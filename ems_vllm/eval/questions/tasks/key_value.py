# SPDX-License-Identifier: Apache-2.0
"""Key-value retrieval from JSON (Liu et al., Lost in the Middle, arXiv 2307.03172)."""

from __future__ import annotations

import json

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.question import Question, writer
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task, too_short
from ems_vllm.eval.questions.tokenizer import Tokenizer


@TASKS.register("kv_retrieval")
class KeyValueRetrieval(Task):
    """The value of one UUID among as many pairs as fit; its depth goes through the grid."""

    metric = "string_match_all"
    max_tokens = 64

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        return self.fitted(key, tokenizer, lambda size: self.question(key, size), minimum=2)

    def question(self, key: Key, num_pairs: int) -> Question:
        """The question with so many pairs."""
        rng = generator(key)
        asked, answer = random_words.identifier(rng), random_words.identifier(rng)
        pairs = [
            (random_words.identifier(rng), random_words.identifier(rng))
            for _ in range(num_pairs - 1)
        ]
        depth = self.options.depths[key.index % len(self.options.depths)]
        pairs.insert(round(depth * len(pairs)), (asked, answer))
        records = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
        return Question(
            instruction="Extract the value corresponding to the specified key in the JSON object "
            "below.\n\nJSON data:\n",
            document=f"{{{records}}}",
            question=f'\n\nKey: "{asked}"\nCorresponding value:',
            neutral_prefix="Value:",
            references=(answer,),
            depth=depth,
            gold=f' "{answer}"',
        )


@TASKS.register("kv_words")
class KeyValueWords(Task):
    """The number beside one word, in a list of as many as fit; its depth goes through the grid.

    Ours, for models to which UUIDs are too long.
    """

    metric = "first_number"
    max_tokens = 12

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        depth = self.options.depths[key.index % len(self.options.depths)]

        def build(size: int) -> Question:
            rng = generator(key)
            names = list(dict.fromkeys(random_words.pair(rng) for _ in range(size)))
            numbers = {name: random_words.number(rng, 4) for name in names}
            asked, *listed = names
            listed.insert(round(depth * len(listed)), asked)
            return Question(
                instruction="A list of words and their numbers follows.\n",
                document="\n".join(f"{name}: {numbers[name]}" for name in listed),
                question=f"\n\nWhat is the number of {asked} in the list?",
                answer_prefix=f"\n{asked}:",
                references=(numbers[asked],),
                depth=depth,
            )

        return self.fitted(key, tokenizer, build, minimum=2)


@TASKS.register("kv_retrieval_75")
class KeyValueRetrieval75(KeyValueRetrieval):
    """The same with 75 pairs, the smallest setting of the paper, whatever the length."""

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        question = self.question(key, 75)
        write = writer(tokenizer)
        needed = max(write(question, protocol).num_tokens for protocol in self.protocols)
        if needed + self.num_new_tokens > key.length:
            raise too_short(key, needed + self.num_new_tokens)
        return self.finished(key, question, write(question, key.protocol), tokenizer, is_all=True)
