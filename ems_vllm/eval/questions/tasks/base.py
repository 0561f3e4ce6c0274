# SPDX-License-Identifier: Apache-2.0
"""What a task is: a family of samples with one metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.questions.longest_prompt import largest_fitting
from ems_vllm.eval.questions.metrics import METRICS
from ems_vllm.eval.questions.protocol import LAST, PROTOCOLS, Protocol
from ems_vllm.eval.questions.question import Question, Writer, Writing, writer
from ems_vllm.eval.questions.sample import Key, Sample
from ems_vllm.eval.questions.tokenizer import Tokenizer
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


class Task(ABC):
    """A family of samples.

    Attributes:
        metric: Name in METRICS.
        higher_is_better: Of the score.
        max_tokens: Generation length.
        stop: Texts that end an answer.
        protocols: Where the question may stand; the first is the task's own.
        follows_full: As in Sample.
    """

    metric: ClassVar[str] = "string_match_all"
    higher_is_better: ClassVar[bool] = True
    max_tokens: ClassVar[int] = 128
    stop: ClassVar[tuple[str, ...]] = ()
    protocols: ClassVar[tuple[Protocol, ...]] = PROTOCOLS
    follows_full: ClassVar[bool] = False

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

    def samples(
        self,
        length: int,
        seed: int,
        count: int,
        tokenizer: Tokenizer,
        protocol: Protocol = LAST,
    ) -> Iterator[Sample]:
        """The first `count` samples of one cell.

        Args:
            length: Tokens that prompt and answer may have together.
            seed: Different seeds share no sample.
            count: More samples leave the first ones as they are.
            tokenizer: The served model's.
            protocol: One of the task's.

        Raises:
            ConfigError: no sample is as short as `length`.
        """
        name = self.name()
        for index in range(count):
            yield self.sample(Key(name, length, seed, index, protocol), tokenizer)

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
        write: Writer | None = None,
    ) -> Sample:
        """The longest sample that fits.

        Its size is the same in all of the task's protocols, so that they ask about one document:
        the largest that fits in each.

        Args:
            key: Of the sample.
            tokenizer: The served model's.
            build: The question of a given size; the same size gives the same question.
            minimum, maximum: Smallest and largest size; there is no largest if it is None.
            write: How questions become prompts; by default in the prompt format.
        """
        write = write or writer(tokenizer)
        room = key.length - self.num_new_tokens
        questions: dict[int, Question] = {}

        def count(size: int, protocols: tuple[Protocol, ...]) -> int:
            questions[size] = build(size)
            return max(write(questions[size], protocol).num_tokens for protocol in protocols)

        own = self.protocols[:1]
        size = largest_fitting(lambda size: count(size, own), room, minimum, maximum)
        if size is not None and len(self.protocols) > 1:
            # Nearly always the same: most tokens are the document's.
            size = largest_fitting(lambda size: count(size, self.protocols), room, minimum, size)
        if size is None:
            needed = count(minimum, self.protocols) + self.num_new_tokens
            raise too_short(key, needed)
        question = questions[size]
        writing = write(question, key.protocol)
        return self.finished(key, question, writing, tokenizer, is_all=size == maximum)

    def finished(
        self,
        key: Key,
        question: Question,
        writing: Writing,
        tokenizer: Tokenizer,
        *,
        is_all: bool = False,
    ) -> Sample:
        """A sample from a question as its protocol writes it.

        Args:
            is_all: There was no more to fill the length with.
        """
        num_new = self.num_new_tokens
        return Sample(
            task=key.task,
            length=key.length,
            depth=question.depth,
            seed=key.seed,
            index=key.index,
            prompt=writing.prompt,
            prompt_token_ids=writing.token_ids,
            max_tokens=num_new,
            references=question.references,
            stop=(*self.stop, *self.options.stop),
            choices=question.choices,
            written_token_ids=writing.written_token_ids,
            natural_length=writing.num_tokens + num_new if is_all else None,
            protocol=key.protocol,
            follows_full=self.follows_full,
            gold_token_ids=tuple(tokenizer.encode_plain(question.gold_text)),
            lead_token_ids=writing.lead_token_ids,
        )


def largest(
    key: Key,
    encode: Callable[[str], list[int]],
    build: Callable[[int], str],
    reserved: int,
    minimum: int,
) -> tuple[int, list[int]]:
    """The size of the largest text that leaves `reserved` tokens, and its token ids.

    Raises:
        ConfigError: not even the smallest fits.
    """
    encoded: dict[int, list[int]] = {}

    def count(size: int) -> int:
        encoded[size] = encode(build(size))
        return len(encoded[size])

    size = largest_fitting(count, key.length - reserved, minimum)
    if size is None:
        raise too_short(key, len(encoded[minimum]) + reserved)
    return size, encoded[size]


def too_short(key: Key, needed: int) -> ConfigError:
    """The error for a length that a task cannot be made for."""
    return ConfigError(
        f"lengths={key.length} is too short for tasks={key.task!r}: use at least {needed} or leave "
        "the task out."
    )
