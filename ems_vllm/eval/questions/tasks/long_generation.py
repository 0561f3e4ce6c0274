# SPDX-License-Identifier: Apache-2.0
"""Recall of what the model itself wrote: a long answer is compressed again and again."""

from __future__ import annotations

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.protocol import LAST
from ems_vllm.eval.questions.question import Question, Writing
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task, largest
from ems_vllm.eval.questions.tokenizer import Tokenizer


@TASKS.register("long_generation")
class LongGeneration(Task):
    """A long list of codes, written token by token, and then one of its codes once more.

    The list is prescribed (engine/measuring/forced_tokens.py), so that every model has written the
    same; it is generated like any answer, and recompressed like one. Only what follows is the
    model's own.
    A request holds up to `recompress_interval` entries more here before it is compressed again,
    which its budget includes.
    """

    metric = "string_match_all"
    max_tokens = 24
    protocols = (LAST,)

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        asked, answer = random_words.pair(rng), random_words.number(rng)
        depth = self.options.depths[key.index % len(self.options.depths)]
        body = (
            "Write a numbered list of items, each with its special magic number. Then repeat the "
            f"number of {asked}.\n"
        )
        prompt = tokenizer.render(body)

        def build(size: int) -> str:
            own = generator(key, "list")
            items = [(random_words.pair(own), random_words.number(own)) for _ in range(size)]
            items.insert(round(depth * size), (asked, answer))
            listed = "\n".join(
                f"{i}. The special magic number for {k} is: {v}."
                for i, (k, v) in enumerate(items, start=1)
            )
            return f"{listed}\nOnce more, the special magic number for {asked} is:"

        token_ids = tokenizer.encode(prompt)
        reserved = self.num_new_tokens + len(token_ids)
        _, written = largest(key, tokenizer.encode_plain, build, reserved, 1)
        question = Question(body, references=(answer,), depth=depth)
        writing = Writing(prompt, tuple(token_ids), tuple(written))
        return self.finished(key, question, writing, tokenizer)
