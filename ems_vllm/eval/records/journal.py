# SPDX-License-Identifier: Apache-2.0
"""Answers of one method on disk, line by line, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.sample import Key
from ems_vllm.eval.records.following import FullAnswer
from ems_vllm.eval.records.results import SampleResult


class Entry(BaseModel):
    """One answer and what it took.

    Attributes:
        result: The answer.
        num_tokens: Generated.
        ttft_s, tpot_s: As in Answer.
        kv_budget: What the (last) request asked for.
        full_answer: What other methods are to follow; of the full cache only.
    """

    model_config = ConfigDict(extra="forbid")

    result: SampleResult
    num_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    kv_budget: int | None = None
    full_answer: FullAnswer | None = None

    @property
    def key(self) -> Key:
        r = self.result
        return Key(r.task, r.length, r.seed, r.index, r.protocol)


class Session(BaseModel):
    """What one uninterrupted run of a method took.

    Attributes:
        wall_s: From the first request to the last answer.
        num_tokens: Generated meanwhile.
        peak_blocks: Most blocks in use; None where the server does not tell.
    """

    model_config = ConfigDict(extra="forbid")

    wall_s: float
    num_tokens: int
    peak_blocks: int | None = None


class Journal:
    """The file of one method.

    Args:
        path: Made when the first line is written. A last line that was cut off is dropped.

    Raises:
        ConfigError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[Key, Entry] = {}
        self.sessions: list[Session] = []
        if path.exists():
            self._read()

    def add(self, line: Entry | Session) -> None:
        """Write a line; it is on disk when this returns."""
        self._keep(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json(exclude_none=True) + "\n")

    def is_answered(self, key: Key) -> bool:
        """Whether there is an answer; a request that failed is sent again."""
        return key in self.entries and self.entries[key].result.error is None

    def _keep(self, line: Entry | Session) -> None:
        if isinstance(line, Session):
            self.sessions.append(line)
        else:
            self.entries[line.key] = line

    def _read(self) -> None:
        text = self._path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            self._path.write_text(text, encoding="utf-8")
        for line in text.splitlines():
            try:
                kind = Session if "wall_s" in json.loads(line) else Entry
                self._keep(kind.model_validate_json(line))
            except (ValueError, ValidationError, TypeError):
                raise ConfigError(
                    f"output={shown(str(self._path))} holds lines that are no answers: give "
                    "another folder with --output."
                ) from None
