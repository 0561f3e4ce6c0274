# SPDX-License-Identifier: Apache-2.0
"""The served model's tokenizer: prompts are measured, and sent, in its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from ems_vllm.config.errors import ConfigError, shown

PromptFormat = Literal["completion", "chat"]
Message = dict[str, str]


class Tokenizer(Protocol):
    """What tasks need of a tokenizer."""

    def render(self, body: str, answer_prefix: str = "") -> str:
        """A prompt as the model sees it; the answer goes on from `answer_prefix`."""
        ...

    def render_first(self, asked: str, document: str, answer_prefix: str) -> str:
        """A prompt whose question stands before the document."""
        ...

    def around_message(self) -> tuple[str, str]:
        """What a prompt has before the user's message, and between it and the answer."""
        ...

    def render_plain(self, text: str) -> str:
        """A prompt outside the chat template, in either format."""
        ...

    def render_chat(self, messages: Sequence[Message]) -> str:
        """A conversation as the model's chat template writes it, up to the next answer."""
        ...

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text, without any special tokens."""
        ...

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, which has its special tokens already."""
        ...

    def encode_special(self) -> list[int]:
        """The special tokens that begin a text."""
        ...

    def end_token_ids(self) -> frozenset[int]:
        """Tokens at which a server ends an answer."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class HubTokenizer:
    """A tokenizer in Hugging Face's format, from a folder or the Hub.

    Args:
        name: Folder or name on the Hub.
        prompt_format: "completion" sends a task's text as it is; "chat" makes it the user's
            message in the model's chat template, and the answer prefix the beginning of the
            assistant's answer, as RULER does.

    Raises:
        ConfigError: there is no such tokenizer, or no chat template where one is needed.
    """

    def __init__(self, name: str, prompt_format: PromptFormat = "completion") -> None:
        # Imported here: it takes seconds, and scoring answers needs no tokenizer.
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        # transformers raises whatever the loader of the day raises.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"tokenizer={shown(name)} cannot be loaded ({type(error).__name__}: {reason}): "
                "give the folder or the Hub's name of the served model with --tokenizer."
            ) from None
        self._end_token_ids = _end_token_ids(name, self._tokenizer.eos_token_id)
        self._name = name
        self._prompt_format = prompt_format
        if prompt_format == "chat":
            self.render("")

    def render(self, body: str, answer_prefix: str = "") -> str:
        if self._prompt_format == "completion":
            return body + answer_prefix
        return self.render_chat([{"role": "user", "content": body}]) + answer_prefix

    def render_first(self, asked: str, document: str, answer_prefix: str) -> str:
        if self._prompt_format == "completion":
            return f"{asked}\n\n{document}\n\n{answer_prefix}"
        turn = {"role": "user", "content": document}
        if self._has_system_turn():
            rendered = self.render_chat([{"role": "system", "content": asked}, turn])
        else:
            rendered = self.render_chat([turn | {"content": f"{asked}\n\n{document}"}])
        return rendered + answer_prefix

    def around_message(self) -> tuple[str, str]:
        if self._prompt_format == "completion":
            return "", ""
        # Any text that no template writes and none strips.
        mark = "<<message>>"
        before, _, after = self.render_chat([{"role": "user", "content": mark}]).partition(mark)
        return before, after

    def render_plain(self, text: str) -> str:
        # `encode` adds no special tokens to a chat's prompt.
        special = self.encode_special() if self._prompt_format == "chat" else []
        return self.decode(special) + text

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=True
            )
        except ValueError as error:
            raise ConfigError(
                f"tokenizer={shown(self._name)} cannot write a conversation ({error}): use "
                "prompt_format=completion and tasks without turns."
            ) from None
        return str(text)

    def _has_system_turn(self) -> bool:
        """Whether the template writes a system's turn; some refuse it, others drop it."""
        mark = "<<system>>"
        turns = [{"role": "system", "content": mark}, {"role": "user", "content": "x"}]
        try:
            return mark in str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        # Templates raise errors of the template engine.
        except Exception:
            return False

    def encode(self, prompt: str) -> list[int]:
        # A chat template writes the special tokens itself.
        special = self._prompt_format == "completion"
        return list(self._tokenizer.encode(prompt, add_special_tokens=special))

    def encode_plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode_plain(text)

    def encode_special(self) -> list[int]:
        return list(self._tokenizer.encode("", add_special_tokens=True))

    def end_token_ids(self) -> frozenset[int]:
        return self._end_token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def _end_token_ids(name: str, eos_token_id: int | None) -> frozenset[int]:
    """The tokenizer's, and those of the model's generation config, as vLLM takes them."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # There is none.
        configured = None
    more = configured if isinstance(configured, list) else [configured]
    return frozenset({eos_token_id, *more} - {None})
