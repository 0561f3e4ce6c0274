# SPDX-License-Identifier: Apache-2.0
"""Prompts for other engines, and their answers: JSON lines (docs/evaluation.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ems_vllm.config.errors import ConfigError, from_pydantic, shown
from ems_vllm.eval.questions.protocol import LAST, Protocol
from ems_vllm.eval.questions.sample import Key, Sample
from ems_vllm.eval.records.following import Followed


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    length: int
    seed: int
    index: int
    protocol: Protocol = LAST

    @property
    def key(self) -> Key:
        return Key(self.task, self.length, self.seed, self.index, self.protocol)


class PromptLine(_Line):
    """One prompt; fields as in Sample."""

    depth: float | None
    prompt: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold_token_ids: tuple[int, ...] = ()
    lead_token_ids: tuple[int, ...] = ()
    written_token_ids: tuple[int, ...] = ()
    continuation_token_ids: tuple[int, ...] = ()
    continuation_bytes: int = 0
    natural_length: int | None = None
    follows_full: bool = False

    @property
    def budget_length(self) -> int:
        """Tokens that a budget's fraction is a fraction of."""
        return self.length if self.natural_length is None else self.natural_length

    @classmethod
    def of(cls, sample: Sample) -> PromptLine:
        return cls(**{name: getattr(sample, name) for name in cls.model_fields})

    def sample(self) -> Sample:
        return Sample(**{name: getattr(self, name) for name in type(self).model_fields})


class AnswerLine(_Line):
    """One answer.

    Attributes:
        output: What was generated, without the prompt.
        logprobs: For prompts with a continuation, instead of `output`: natural logarithms of the
            probabilities of its tokens.
        followed: For prompts that follow the full cache: how the engine's own full cache, which
            answered first, is followed.
        gold_logprobs: Of a right answer's tokens (after lead_token_ids), beside `output`: the same.
        prompt_tokens: Tokens that the engine processed before the answer.
        error: Why there is no answer; it scores 0.
    """

    output: str = ""
    logprobs: tuple[float, ...] | None = None
    followed: Followed | None = None
    gold_logprobs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None
    error: str | None = None


_L = TypeVar("_L", bound=_Line)


def export(samples: Iterable[Sample], path: Path) -> int:
    """Write the prompts of samples that are one prompt.

    Conversations, and long lists that are compressed while they are written, are left out.

    Returns:
        How many were written.
    """
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            if not sample.turns and not sample.compresses_writing:
                file.write(PromptLine.of(sample).model_dump_json() + "\n")
                count += 1
    return count


def read(path: Path, kind: type[_L], option: str) -> Iterator[_L]:
    """The lines of a file; `option` names the argument that pointed to it.

    Raises:
        ConfigError: the file or a line of it is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option}={shown(str(path))} cannot be read ({reason}): give a file of JSON lines."
        ) from None
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            raise from_pydantic(error, f"{option} line {i}: ", kind.model_fields) from None


def read_prompts(path: Path) -> list[PromptLine]:
    """What `ems-vllm eval --export-prompts` wrote.

    Raises:
        ConfigError: the file or a line of it is not what it should be.
    """
    return list(read(path, PromptLine, "prompts"))
