# SPDX-License-Identifier: Apache-2.0
"""What a task is: a family of samples with one metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.fitting import largest_fitting
from ems_vllm.eval.metrics import METRICS
from ems_vllm.eval.sample import Key, Sample
from ems_vllm.eval.tokenizer import Tokenizer
from ems_vllm.registry import Registry

TASKS: Registry[Task] = Registry("task")


@dataclass(frozen=True)
class TaskOptions:
    """What a run may choose for its tasks.

    Attributes:
        depths: Depths that needle tasks with a grid go through, 0 (start) to 1 (end).
        max_tokens: Upper bound of the generation length; None: the task's own.
        stop: Texts that end an answer, beside the task's own.
        text_path: File or folder of plain text for haystacks and documents; None: what ships with
            the package.
        data_path: Folder of the public data sets that some tasks read (see docs/evaluation.md).
    """

    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    text_path: Path | None = None
    data_path: Path | None = None


@dataclass(frozen=True)
class Question:
    """What a task writes: a text, and what is right.

    Attributes:
        body: Everything up to the answer prefix.
        answer_prefix: How the answer begins; the model goes on from there.
        references, choices, depth: As in Sample.
    """

    body: str
    answer_prefix: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    depth: float | None = None


class Task(ABC):
    """A family of samples.

    Attributes:
        metric: Name in METRICS.
        higher_is_better: Of the score.
        max_tokens: Generation length.
        stop: Texts that end an answer.
    """

    metric: ClassVar[str] = "string_match_all"
    higher_is_better: ClassVar[bool] = True
    max_tokens: ClassVar[int] = 128
    stop: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: TaskOptions = TaskOptions()) -> None:
        self.options = options

    @classmethod
    def name(cls) -> str:
        return next(name for name in TASKS if TASKS.get(name) is cls)

    @property
    def num_new_tokens(self) -> int:
        """Generation length of this run."""
        bound = self.options.max_tokens
        return self.max_tokens if bound is None else min(self.max_tokens, bound)

    def samples(self, length: int, seed: int, count: int, tokenizer: Tokenizer) -> Iterator[Sample]:
        """The first `count` samples of one cell.

        Args:
            length: Tokens that prompt and answer may have together.
            seed: Different seeds share no sample.
            count: More samples leave the first ones as they are.
            tokenizer: The served model's.

        Raises:
            ConfigError: no sample is as short as `length`.
        """
        name = self.name()
        for index in range(count):
            yield self.sample(Key(name, length, seed, index), tokenizer)

    @abstractmethod
    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        """The sample of this key."""

    @classmethod
    def score(cls, sample: Sample, output: str) -> float:
        """Quality of an answer, in [0, 1]."""
        return METRICS[cls.metric](output, sample.references, sample.choices)

    def fitted(
        self,
        key: Key,
        tokenizer: Tokenizer,
        build: Callable[[int], Question],
        minimum: int,
        maximum: int | None = None,
    ) -> Sample:
        """The longest sample that fits.

        Args:
            key: Of the sample.
            tokenizer: The served model's.
            build: The question of a given size; the same size gives the same question.
            minimum, maximum: Smallest and largest size; there is no largest if it is None.
        """
        size, question, prompt, token_ids = self.largest(
            key, tokenizer.encode, build, self.num_new_tokens, minimum, maximum, tokenizer.render
        )
        return self.finished(key, question, prompt, token_ids, is_all=size == maximum)

    @staticmethod
    def largest(
        key: Key,
        encode: Callable[[str], list[int]],
        build: Callable[[int], Question],
        reserved: int,
        minimum: int,
        maximum: int | None = None,
        render: Callable[[str, str], str] = lambda body, prefix: body + prefix,
    ) -> tuple[int, Question, str, list[int]]:
        """The largest question that leaves `reserved` tokens: its size, text and token ids."""
        encoded: dict[int, tuple[Question, str, list[int]]] = {}

        def count(size: int) -> int:
            question = build(size)
            text = render(question.body, question.answer_prefix)
            encoded[size] = (question, text, encode(text))
            return len(encoded[size][2])

        size = largest_fitting(count, key.length - reserved, minimum, maximum)
        if size is None:
            raise too_short(key, len(encoded[minimum][2]) + reserved)
        return (size, *encoded[size])

    def finished(
        self,
        key: Key,
        question: Question,
        prompt: str,
        token_ids: list[int],
        *,
        is_all: bool = False,
    ) -> Sample:
        """A sample from a question and its encoded prompt.

        Args:
            is_all: There was no more to fill the length with.
        """
        return Sample(
            task=key.task,
            length=key.length,
            depth=question.depth,
            seed=key.seed,
            index=key.index,
            prompt=prompt,
            prompt_token_ids=tuple(token_ids),
            max_tokens=self.num_new_tokens,
            references=question.references,
            stop=(*self.stop, *self.options.stop),
            choices=question.choices,
            natural_length=len(token_ids) + self.num_new_tokens if is_all else None,
        )


def too_short(key: Key, needed: int) -> ConfigError:
    """The error for a length that a task cannot be made for."""
    return ConfigError(
        f"lengths={key.length} is too short for tasks={key.task!r}: use at least {needed} or leave "
        "the task out."
    )
