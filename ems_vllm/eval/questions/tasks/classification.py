# SPDX-License-Identifier: Apache-2.0
"""Classification by example: what a label means is said nowhere but in the examples. Ours."""

from __future__ import annotations

import random

from ems_vllm.eval.questions import random_words
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_TOPICS = {
    "animals": "badger beaver camel donkey eagle falcon goat heron horse lion mule otter owl pig",
    "food": "apple bread butter carrot cheese honey lemon onion pear pepper plum rice soup sugar",
    "tools": "axe brush chisel drill file hammer hoe knife ladder needle plough rake saw spade",
    "clothes": "apron belt boot cap cloak coat dress glove hat jacket scarf shirt shoe skirt",
    "buildings": "barn castle chapel church cottage factory hotel inn library mill palace temple",
}
_SENTENCES = (
    "I saw the {} again this morning.",
    "Nobody had told us about the {}.",
    "She drew a picture of the {}.",
    "We talked about the {} for an hour.",
    "There was a photograph of the {} in the paper.",
    "He could not stop thinking of the {}.",
    "They wrote a song about the {}.",
    "My sister asked me about the {}.",
)


@TASKS.register("few_shot")
class FewShotClassification(Task):
    """One of five topics by as many examples as fit.

    The labels are words without a meaning here, drawn anew for every sample, so that knowledge of
    the topics alone does not help. The asked sentence is in none of the examples, its noun is.
    """

    metric = "classification_first_line"
    max_tokens = 8
    stop = ("\n",)

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        labels = dict(
            zip(_TOPICS, rng.sample(sorted(random_words.ADJECTIVES), len(_TOPICS)), strict=True)
        )
        topic = rng.choice(sorted(_TOPICS))
        noun, sentence = rng.choice(_TOPICS[topic].split()), rng.choice(_SENTENCES)
        asked = sentence.format(noun)

        def build(size: int) -> Question:
            own = generator(key, "examples")
            examples = [_example(own, labels) for _ in range(size)]
            known = _other(generator(key, "known"), sentence).format(noun)
            examples[size // 2] = (known, labels[topic])
            shown = "\n\n".join(f"Text: {t}\nLabel: {label}" for t, label in examples if t != asked)
            return Question(
                document=shown,
                question=f"\n\nText: {asked}",
                answer_prefix="\nLabel:",
                neutral_prefix="Label:",
                references=(labels[topic],),
                choices=tuple(labels.values()),
            )

        return self.fitted(key, tokenizer, build, minimum=2)


def _other(rng: random.Random, sentence: str) -> str:
    """Another sentence."""
    return rng.choice([other for other in _SENTENCES if other != sentence])


def _example(rng: random.Random, labels: dict[str, str]) -> tuple[str, str]:
    topic = rng.choice(sorted(_TOPICS))
    return rng.choice(_SENTENCES).format(rng.choice(_TOPICS[topic].split())), labels[topic]
