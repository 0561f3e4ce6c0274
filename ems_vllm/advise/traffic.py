# SPDX-License-Identifier: Apache-2.0
"""The requests of a traffic file, with their lengths in the model's own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ems_vllm.advise.line import Line, parse_line
from ems_vllm.config.errors import ConfigError, shown

if TYPE_CHECKING:
    from ems_vllm.eval.questions.tokenizer import HubTokenizer


class OutputFrom(StrEnum):
    """Where the length of an answer comes from.

    Attributes:
        RECORDED: From the file: completion_tokens, or the text of a completion.
        BOUND: max_tokens, which it may not have reached.
        ASSUMED: --output-len.
    """

    RECORDED = "recorded"
    BOUND = "max_tokens"
    ASSUMED = "assumed"


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt_len: Tokens, >= 1.
        output_len: Tokens generated, >= 0.
        output_from: How that is known.
        arrival: Seconds after the first one; None where the file has no times.
        token_ids: Of the prompt; None where only its length is known.
    """

    prompt_len: int
    output_len: int
    output_from: OutputFrom
    arrival: float | None = None
    token_ids: tuple[int, ...] | None = None


def read_traffic(path: Path, load: Callable[[], HubTokenizer], output_len: int) -> list[Request]:
    """The requests of a file, by their arrival where it has times.

    Args:
        path: JSON lines, as docs/advise.md describes them.
        load: Gives the model's tokenizer; called once, and only where there are texts.
        output_len: Tokens of answers of which a line says nothing.

    Raises:
        ConfigError: the file or a line of it is not what it should be.
    """
    lines = _lines(path)
    timed = [line.arrival_time for _, line in lines if line.arrival_time is not None]
    for where, line in lines:
        if timed and line.arrival_time is None:
            raise ConfigError(
                f"{where}: arrival_time is missing, and other lines have it: give it to all lines "
                "or to none."
            )
    start = min(timed, default=0.0)
    tokenizer = load() if any(_has_words(line) for _, line in lines) else None
    found = [_request(where, line, tokenizer, output_len, start) for where, line in lines]
    return sorted(found, key=lambda request: request.arrival or 0.0)


def _lines(path: Path) -> list[tuple[str, Line]]:
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"prompts={shown(str(path))} cannot be read ({reason}): give a file of JSON lines."
        ) from None
    found = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            where = f"{path} line {number}"
            found.append((where, parse_line(text, where)))
    if not found:
        raise ConfigError(f"prompts={shown(str(path))} holds no request: give one a line.")
    return found


def _has_words(line: Line) -> bool:
    """Whether there is anything to tokenise."""
    return isinstance(line.prompt, str) or line.messages is not None or bool(line.completion)


def _request(
    where: str, line: Line, tokenizer: HubTokenizer | None, output_len: int, start: float
) -> Request:
    token_ids = _token_ids(where, line, tokenizer)
    prompt_len = line.prompt_tokens if token_ids is None else len(token_ids)
    assert prompt_len is not None
    generated, origin = output_len, OutputFrom.ASSUMED
    if line.completion_tokens is not None:
        # Counts what was generated and not shown, too.
        generated, origin = line.completion_tokens, OutputFrom.RECORDED
    elif line.completion is not None:
        assert tokenizer is not None or not line.completion
        written = tokenizer.encode_plain(line.completion) if tokenizer else []
        generated, origin = len(written), OutputFrom.RECORDED
    elif line.max_tokens is not None:
        generated, origin = line.max_tokens, OutputFrom.BOUND
    arrival = None if line.arrival_time is None else line.arrival_time - start
    return Request(prompt_len, generated, origin, arrival, token_ids)


def _token_ids(where: str, line: Line, tokenizer: HubTokenizer | None) -> tuple[int, ...] | None:
    if isinstance(line.prompt, list):
        return tuple(line.prompt)
    if not line.has_text:
        return None
    assert tokenizer is not None
    if isinstance(line.prompt, str):
        return tuple(tokenizer.encode(line.prompt))
    messages: list[dict[str, Any]] = line.messages or []
    try:
        rendered = tokenizer.render_chat(messages, line.tools)
    # Templates raise errors of the template engine and of their own.
    except Exception as error:
        raise ConfigError(
            f"{where}: messages cannot be written in the model's chat template "
            f"({str(error).strip() or type(error).__name__}): give a prompt as text, or the "
            "prompt_tokens alone."
        ) from None
    return tuple(tokenizer.encode_rendered(rendered))
