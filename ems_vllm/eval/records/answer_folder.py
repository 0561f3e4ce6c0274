# SPDX-License-Identifier: Apache-2.0
"""A folder of answers that is filled bit by bit, and the result that comes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.sample import Key
from ems_vllm.eval.questions.tasks import TASKS
from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine, read
from ems_vllm.eval.records.results import EvalResult, MethodResult
from ems_vllm.eval.records.scoring import scored


class AnswerFile:
    """Answers of one method at one budget, written as they come; a later run goes on from them.

    Args:
        path: JSON lines; created where missing. What follows the last complete line, left behind
            by a run that was killed, is cut off.

    Attributes:
        done: Keys that have an answer.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        self.done: set[Key] = {
            AnswerLine.model_validate_json(line).key for line in complete.splitlines()
        }
        self._file = path.open("ab")
        self._file.truncate(len(complete))

    def write(self, answer: AnswerLine) -> None:
        line = answer.model_dump_json(exclude_defaults=True)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.done.add(answer.key)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Note in a folder what its answers are answers to; a later run must say the same.

    Raises:
        ConfigError: the folder has answers to something else.
    """
    path = folder / "manifest.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(known.keys() | manifest.keys()):
            if known.get(key) != manifest.get(key):
                raise ConfigError(
                    f"out={shown(str(folder))} holds answers with {key}={shown(known.get(key))}, "
                    f"and this run has {shown(manifest.get(key))}: choose another folder."
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def fingerprint(path: Path) -> str:
    """A digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_result(
    path: Path,
    prompts: Sequence[PromptLine],
    answers: Mapping[Path, MethodResult],
    model: str,
    environment: dict[str, Any],
) -> EvalResult:
    """Score files of answers and write them as one result.

    Args:
        path: Of the result.
        prompts: What was asked.
        answers: What was run, without samples, by its file of answers. A prompt that a method has
            no answer to is none of its samples.
        model: Name of the model.
        environment: For the result.
    """
    methods = []
    for file, method in answers.items():
        given = {answer.key: answer for answer in read(file, AnswerLine, "answers")}
        samples = [
            scored(prompt.sample(), given[prompt.key]) for prompt in prompts if prompt.key in given
        ]
        methods.append(method.model_copy(update={"samples": samples}))
    tasks = sorted({prompt.task for prompt in prompts})
    result = EvalResult(
        model=model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment,
        higher_is_better={task: TASKS.get(task).higher_is_better for task in tasks},
        methods=methods,
    )
    result.write(path)
    return result


_M = TypeVar("_M")


@dataclass(frozen=True)
class Missing(Generic[_M]):
    """A prompt and the methods that have not answered it."""

    prompt: PromptLine
    methods: list[_M]


def missing(prompts: Iterable[PromptLine], files: Mapping[_M, AnswerFile]) -> list[Missing[_M]]:
    """What is left to do, short prompts first, so that their cells are complete early."""
    todo = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.prompt_token_ids)):
        methods = [method for method, file in files.items() if prompt.key not in file.done]
        if methods:
            todo.append(Missing(prompt, methods))
    return todo
