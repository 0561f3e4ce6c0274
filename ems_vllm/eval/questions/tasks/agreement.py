# SPDX-License-Identifier: Apache-2.0
"""Whether a compressed cache writes what the full cache writes: summaries and conversations. Ours.

Nothing is right or wrong here, so that models can be measured that pass no other task, and texts
that nobody wrote questions for. See following.py for the two figures; each is a task.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import replace

from ems_vllm.eval.questions.haystack import essay, essay_words
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_TURN_WORDS = 60
_REPLIES = (
    "I see. Please go on.",
    "That is interesting. What happened then?",
    "Thank you, I have noted it.",
    "I understand. Tell me more.",
)


class FollowingTask(Task):
    """The score is the share of the full cache's answer before the first divergence."""

    metric = "agreement"
    max_tokens = 64
    follows_full = True

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        text = essay_words(self.options.text_path)
        start = rng.randrange(len(text))

        def build(size: int) -> Question:
            return self._question(essay(text, start, size), generator(key, "document"))

        sample = self.fitted(key, tokenizer, build, minimum=20)
        # The answer ends where the full cache's does.
        return replace(sample, stop=())

    @abstractmethod
    def _question(self, sentences: list[str], rng: random.Random) -> Question:
        """The question about some sentences of a text."""


@TASKS.register("agreement_summary")
class AgreementSummary(FollowingTask):
    """A summary of prose."""

    def _question(self, sentences: list[str], rng: random.Random) -> Question:
        return Question(
            instruction="Read the following text. I will ask for a summary.\n\n",
            document=" ".join(sentences),
            question="\n\nSummarize the text above in a few sentences.",
            answer_prefix="\n\nSummary:",
            neutral_prefix="Summary:",
        )


@TASKS.register("agreement_chat")
class AgreementChat(FollowingTask):
    """The next message of a long conversation, written as a transcript."""

    def _question(self, sentences: list[str], rng: random.Random) -> Question:
        words = " ".join(sentences).split()
        turns = [
            f"Visitor: {' '.join(words[i : i + _TURN_WORDS])}\nAssistant: {rng.choice(_REPLIES)}"
            for i in range(0, len(words), _TURN_WORDS)
        ]
        return Question(
            instruction="This is a conversation of a visitor with an assistant.\n\n",
            document="\n".join(turns),
            question="\nVisitor: Now tell me what you remember of all that I have told you.",
            answer_prefix="\nAssistant:",
            neutral_prefix="Assistant:",
        )


@TASKS.register("kl_summary")
class KlSummary(AgreementSummary):
    """The same, but the score is the KL divergence in nats per token."""

    metric = "kl"
    higher_is_better = False


@TASKS.register("kl_chat")
class KlChat(AgreementChat):
    """The same, but the score is the KL divergence in nats per token."""

    metric = "kl"
    higher_is_better = False
