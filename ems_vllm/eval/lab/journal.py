# SPDX-License-Identifier: Apache-2.0
"""Measurements on disk, prompt by prompt, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.lab.forcing import Measurement


class Record(BaseModel):
    """What was measured on one prompt.

    Attributes:
        prompt: Its digest.
        full: The full cache.
        cells: By digest of what the measurement depends on.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    full: Measurement
    cells: dict[str, Measurement]


class Journal:
    """A file of JSON lines: what all measurements have in common, then records.

    Args:
        path: Made when the first record is written. A last line that was cut off is dropped.
        common: What all measurements depend on, as plain JSON data.

    Raises:
        ConfigError: the file holds something else, or measurements with something else in common.

    Attributes:
        records: By the prompt's digest.
    """

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self._path = path
        self._common = common
        self.records: dict[str, Record] = {}
        if path.exists():
            self._read()

    def add(self, record: Record) -> None:
        """Write a record; it is on disk when this returns."""
        self._keep(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps(self._common) + "\n")
            file.write(record.model_dump_json(exclude_none=True) + "\n")

    def _keep(self, record: Record) -> None:
        known = self.records.get(record.prompt)
        cells = {**known.cells, **record.cells} if known else record.cells
        self.records[record.prompt] = record.model_copy(update={"cells": cells})

    def _read(self) -> None:
        text = self._path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            self._path.write_text(text, encoding="utf-8")
        lines = text.splitlines()
        try:
            if lines:
                self._check(json.loads(lines[0]))
            for line in lines[1:]:
                self._keep(Record.model_validate_json(line))
        except ConfigError:
            raise
        except (ValueError, ValidationError, TypeError):
            raise ConfigError(
                f"out={shown(str(self._path))} holds lines that are no measurements: give another "
                "file with --out."
            ) from None

    def _check(self, known: dict[str, Any]) -> None:
        for key in sorted(known.keys() | self._common.keys()):
            if known.get(key) != self._common.get(key):
                raise ConfigError(
                    f"out={shown(str(self._path))} holds measurements with "
                    f"{key}={shown(known.get(key))}, and this run has "
                    f"{shown(self._common.get(key))}: give another file with --out."
                )
