# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what was asked, every answer, logs of servers, the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.records.journal import Journal
from ems_vllm.eval.records.method import Method
from ems_vllm.eval.records.preset import Preset

# Answers to other ones of these are answers to other questions.
_DECIDE = {
    "depths", "max_tokens", "stop", "prompt_format", "text_path", "data_path", "server",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Where files of a run lie.

    Attributes:
        path: Of the folder; made by `claim`.
    """

    path: Path

    @property
    def result(self) -> Path:
        return self.path / "results.json"

    def claim(self, model: str, tokenizer: str, preset: Preset) -> None:
        """Refuse to mix answers to different questions in one folder.

        Raises:
            ConfigError: it holds answers of another model, or under other settings.
        """
        described = {
            "model": model,
            "tokenizer": tokenizer,
            **preset.model_dump(mode="json", include=_DECIDE),
        }
        file = self.path / "run.json"
        text = json.dumps(described, indent=1, sort_keys=True) + "\n"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"output={shown(str(self.path))} holds another run (see run.json there): give "
                "another folder, or the same model and settings to go on."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def journal(self, method: Method) -> Journal:
        """Answers of a method, read from disk."""
        return Journal(self.path / "samples" / f"{_file_name(str(method))}.jsonl")

    def server_log(self, recipe: str) -> Path:
        return self.path / f"server-{_file_name(recipe)}.log"


def _file_name(name: str) -> str:
    """A name as part of a file's; what cannot stand there becomes a digest's."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    if kept.replace("-", " ") == name.replace("-", " "):
        return kept
    return f"{kept[-60:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
