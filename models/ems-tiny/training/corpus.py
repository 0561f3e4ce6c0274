# SPDX-License-Identifier: Apache-2.0
"""Novels as token arrays cut at sentences, and the words that keys and values are made of."""

import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

HELD_OUT = ("Doyle_Hound_1902", "Woolf_Night_1919", "Hardy_Jude_1895")


def clean(text: str) -> str:
    """One line, single spaces: how line breaks fall in a file is nothing to learn."""
    return re.sub(r"\s+", " ", text).strip()


def training_files(novels: Path) -> list[Path]:
    """All novels but the held-out ones, in a fixed order."""
    files = [p for p in sorted(novels.glob("*.txt")) if p.stem not in HELD_OUT]
    if not files:
        raise FileNotFoundError(f"no *.txt in {novels}: --novels must name a folder of novels")
    return files


def held_out_word(word: str) -> bool:
    """Whether a word is kept for the checks: a tenth of all, by a hash that never changes."""
    return zlib.crc32(word.encode()) % 10 == 0


def common_words(files: list[Path]) -> list[str]:
    """Lower-case words of 3 to 9 letters that occur at least 25 times, in alphabetical order."""
    counts: Counter[str] = Counter()
    for path in files:
        counts.update(re.findall(r"(?<![\w'])[a-z]{3,9}(?![\w'])", path.read_text("utf-8")))
    return sorted(w for w, n in counts.items() if n >= 25)


class Corpus:
    """Tokens of all training novels with the starts of sentences.

    Attributes:
        tokens: uint16 [N].
        starts: int64 [S + 1], offsets of sentences in `tokens`; each begins with a space.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.starts = tokens, starts

    @classmethod
    def build(cls, files: list[Path], tokenizer: PreTrainedTokenizerFast, cache: Path) -> "Corpus":
        """Tokenise, or read the cache that an earlier run left."""
        if not cache.is_file():
            parts, lengths = [], []
            for path in files:
                text = clean(path.read_text("utf-8"))
                sentences = [" " + s for s in re.split(r"(?<=[.!?]) (?=[A-Z\"'])", text)]
                for e in tokenizer.backend_tokenizer.encode_batch_fast(
                    sentences, add_special_tokens=False
                ):
                    parts.append(np.array(e.ids, np.uint16))
                    lengths.append(len(e.ids))
            starts = np.concatenate([[0], np.cumsum(lengths)])
            with cache.open("wb") as file:
                np.savez(file, tokens=np.concatenate(parts), starts=starts)
        data = np.load(cache)
        return cls(data["tokens"], data["starts"])

    def sentences(self, first: int, budget: int) -> list[np.ndarray]:
        """Consecutive sentences from number `first` on, together at most `budget` tokens."""
        found, used = [], 0
        for i in range(first, len(self.starts) - 1):
            size = int(self.starts[i + 1] - self.starts[i])
            if used + size > budget:
                break
            found.append(self.tokens[self.starts[i] : self.starts[i + 1]])
            used += size
        return found
