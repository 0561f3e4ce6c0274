# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that needs no files: four letters or digits, or one other character, a token."""

import re
from collections.abc import Sequence

from ems_vllm.eval.questions.tokenizer import Message


class ToyTokenizer:
    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def render(self, body: str, answer_prefix: str = "") -> str:
        return body + answer_prefix

    def render_first(self, asked: str, document: str, answer_prefix: str) -> str:
        return f"{asked}\n\n{document}\n\n{answer_prefix}"

    def around_message(self) -> tuple[str, str]:
        return "", ""

    def render_plain(self, text: str) -> str:
        return text

    def render_chat(self, messages: Sequence[Message]) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"

    def encode(self, prompt: str) -> list[int]:
        return self.encode_plain(prompt)

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode_plain(text)

    def encode_special(self) -> list[int]:
        return []

    def encode_plain(self, text: str) -> list[int]:
        token_ids = []
        for piece in re.findall(r"\w{1,4}|\W", text):
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
            token_ids.append(self._ids[piece])
        return token_ids

    def end_token_ids(self) -> frozenset[int]:
        return frozenset()

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self._pieces[i] for i in token_ids)
