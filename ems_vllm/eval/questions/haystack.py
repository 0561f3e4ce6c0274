# SPDX-License-Identifier: Apache-2.0
"""Text in which needles are hidden, and documents that are predicted."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ems_vllm.config.errors import ConfigError, shown

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")


def read_texts(path: Path | None) -> list[str]:
    """Texts of a file or of the `.txt` files of a folder; the package's own by default.

    Raises:
        ConfigError: there is no text.
    """
    return list(_read(path))


@functools.cache
def _read(path: Path | None) -> tuple[str, ...]:
    if path is None:
        folder = resources.files("ems_vllm.eval.questions") / "texts"
        files = [entry for entry in folder.iterdir() if entry.name.endswith(".txt")]
        return tuple(
            entry.read_text(encoding="utf-8") for entry in sorted(files, key=lambda f: f.name)
        )
    try:
        paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = tuple(file.read_text(encoding="utf-8") for file in paths)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"text_path={shown(str(path))} cannot be read ({reason}): give a text file or a folder "
            "of .txt files."
        ) from None
    if not any(text.strip() for text in texts):
        raise ConfigError(
            f"text_path={shown(str(path))} holds no text: give a text file or a folder of .txt "
            "files."
        )
    return texts


@functools.cache
def essay_words(path: Path | None) -> tuple[str, ...]:
    """All words of the texts, in order, white space collapsed."""
    return tuple(word for text in _read(path) for word in text.split())


def essay(words: Sequence[str], start: int, count: int) -> list[str]:
    """Sentences of `count` words from word `start` on; the text begins again where it ends."""
    chosen = [words[(start + i) % len(words)] for i in range(count)]
    return sentences(" ".join(chosen))


def sentences(text: str) -> list[str]:
    """Splits after full stops, question and exclamation marks before a capital letter."""
    return [part for part in _SENTENCE_END.split(text) if part]


def insert_at_depths(
    units: Sequence[str], needles: Sequence[str], depths: Sequence[float]
) -> list[str]:
    """Put each needle before the unit at its depth, 0 (before all) to 1 (after all)."""
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    result: list[str] = []
    done = 0
    for i in order:
        position = round(depths[i] * len(units))
        result += units[done:position]
        result.append(needles[i])
        done = position
    return [*result, *units[done:]]
