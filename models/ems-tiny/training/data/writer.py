# SPDX-License-Identifier: Apache-2.0
"""A sequence under construction: tokens, each marked as text or as an answer to be learned."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from training.tokenizer import BOS

IGNORED, TEXT, ANSWER = 0, 1, 2


class Writer:
    """Collects at most `length` tokens.

    Pieces are tokenised one by one, so a piece must begin where the tokenizer would cut anyway: at
    the space before a word, or between letters and punctuation. `tests/training` checks it.

    Attributes:
        ids: Tokens so far, `<s>` first.
        marks: IGNORED, TEXT or ANSWER for every token of `ids`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self.length = length
        self.ids: list[int] = [BOS]
        self.marks: list[int] = [IGNORED]

    @property
    def room(self) -> int:
        return self.length - len(self.ids)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def add(self, piece: str | Iterable[int], mark: int = TEXT) -> None:
        """Append text or tokens."""
        ids = self.encode(piece) if isinstance(piece, str) else [int(i) for i in piece]
        self.ids += ids
        self.marks += [mark] * len(ids)

    def add_if_room(self, pieces: list[tuple[str, int]], reserve: int = 0) -> bool:
        """Append marked pieces, all or (where they would not fit) none of them."""
        encoded = [(self.encode(text), mark) for text, mark in pieces if text]
        if sum(len(ids) for ids, _ in encoded) + reserve > self.room:
            return False
        for ids, mark in encoded:
            self.add(ids, mark)
        return True
