# SPDX-License-Identifier: Apache-2.0
"""Recall across turns of a conversation: told in turn 1, asked in turn 6."""

from __future__ import annotations

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.haystack import essay, essay_words
from ems_vllm.eval.questions.protocol import LAST
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task, largest
from ems_vllm.eval.questions.tokenizer import Message, Tokenizer

_NUM_TURNS = 6
_NUM_FACTS = 5
# Generated between the first question and the last one, a turn.
TURN_TOKENS = 16


@TASKS.register("multi_turn")
class MultiTurn(Task):
    """Five facts, then four turns with passages to read, then the question for one of the facts.

    Every turn is a request of its own to `/v1/chat/completions` with the whole conversation so far,
    the model's own answers included, so each is compressed anew.
    """

    metric = "string_match_all"
    max_tokens = 32
    protocols = (LAST,)

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        facts = {random_words.pair(rng): random_words.number(rng) for _ in range(_NUM_FACTS)}
        asked = rng.choice(list(facts))
        listed = "\n".join(f"The special magic number for {k} is: {v}." for k, v in facts.items())
        first = (
            f"Remember these facts. I will ask for one of them later.\n{listed}\nAnswer with OK."
        )
        last = (
            f"What is the special magic number for {asked}, which I told you in my first message? "
            "Answer with the number alone."
        )
        text = essay_words(self.options.text_path)
        start = rng.randrange(len(text))
        turns: dict[int, tuple[str, ...]] = {}

        def build(size: int) -> str:
            passages = [
                " ".join(essay(text, (start + i * size) % len(text), size))
                for i in range(_NUM_TURNS - 2)
            ]
            middle = (f"Read this passage and answer with OK.\n{passage}" for passage in passages)
            turns[size] = (first, *middle, last)
            messages: list[Message] = []
            for turn in turns[size]:
                messages += [
                    {"role": "user", "content": turn},
                    {"role": "assistant", "content": ""},
                ]
            return tokenizer.render_chat(messages[:-1])

        # The conversation is already rendered.
        reserved = self.num_new_tokens + (_NUM_TURNS - 1) * TURN_TOKENS
        size, _ = largest(key, tokenizer.encode_rendered, build, reserved, 1)
        return Sample(
            task=key.task,
            length=key.length,
            depth=None,
            seed=key.seed,
            index=key.index,
            prompt="",
            prompt_token_ids=(),
            max_tokens=self.num_new_tokens,
            references=(facts[asked],),
            stop=self.options.stop,
            turns=turns[size],
        )
