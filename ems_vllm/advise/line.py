# SPDX-License-Identifier: Apache-2.0
"""A line of a traffic file, as it was written: what was asked, or how long it was."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from ems_vllm.config.errors import ConfigError, from_pydantic, shown

_Count = Annotated[int, Field(strict=True, ge=0)]
_SEVERAL = "it stands for several requests; write a line for each"
_TEXTS_ONLY = "only text can be replayed; leave the line out, or give its prompt_tokens alone"


class Line(BaseModel):
    """What a request's line says; other keys of it are not read.

    Attributes:
        prompt: Text or token ids.
        messages: Of a conversation, in OpenAI's format.
        tools: That the conversation may use; chat templates write them out.
        completion: The recorded answer.
        prompt_tokens, completion_tokens: Recorded lengths, in tokens.
        max_tokens: That the answer may have.
        arrival_time: Seconds from any start.
        n: Answers that are asked for.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    completion: str | None = None
    prompt_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    completion_tokens: _Count | None = None
    max_tokens: _Count | None = Field(
        None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    arrival_time: float | None = Field(
        None, validation_alias=AliasChoices("arrival_time", "created")
    )
    n: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            is_right = value != ""
        else:
            is_right = isinstance(value, list) and all(type(token) is int for token in value)
            if not is_right and isinstance(value, list):
                raise ValueError(_SEVERAL)
            is_right = bool(is_right and value and min(value) >= 0)
        if not is_right:
            raise ValueError("give a text or a list of token ids that is not empty")
        return value

    @field_validator("messages", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise ValueError("give a list of messages, each with role and content")
        return [_message(message) for message in value]

    @field_validator("arrival_time", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            try:
                moment = datetime.fromisoformat(value)
            except ValueError:
                raise ValueError("give seconds, or a time like 2026-01-31T12:00:00Z") from None
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError("give seconds, or a time like 2026-01-31T12:00:00Z")
        return value

    @field_validator("n")
    @classmethod
    def _one_answer(cls, value: int | None) -> int | None:
        if value is not None and value != 1:
            raise ValueError(_SEVERAL)
        return value

    @property
    def has_text(self) -> bool:
        return self.prompt is not None or self.messages is not None


def parse_line(text: str, where: str) -> Line:
    """Read one line.

    Args:
        text: JSON.
        where: File and line, for a message.

    Raises:
        ConfigError: it is none of the formats in docs/advise.md.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{where}: {shown(text)} is not JSON: write one object a line (docs/advise.md)."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}: {shown(data)} is no object: write one with prompt, messages or "
            "prompt_tokens."
        )
    try:
        line = Line.model_validate(_flat(data))
    except ValidationError as error:
        raise from_pydantic(error, f"{where}: ", Line.model_fields) from None
    if line.prompt is not None and line.messages is not None:
        raise ConfigError(f"{where}: prompt and messages are two requests: give one of them.")
    if not line.has_text and line.prompt_tokens is None:
        raise ConfigError(
            f"{where}: {shown(data)} says neither what was asked nor how long it was: give prompt "
            "or messages (or a body with one of them), or prompt_tokens and completion_tokens (or "
            "the usage of an answer)."
        )
    return line


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """The parts of a line side by side: a batch's request, a batch's answer, and its usage."""
    flat = dict(data)
    for key in ("body", "response"):
        part = flat.get(key)
        if key == "response" and isinstance(part, dict):
            part = part.get("body")
        if isinstance(part, dict):
            flat |= part
    usage = flat.get("usage")
    return flat | usage if isinstance(usage, dict) else flat


def _message(message: Any) -> dict[str, Any]:
    """A message as chat templates take it: its content as one text, arguments of tools as data."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("every message needs a role and a content")
    written = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            raise ValueError(_TEXTS_ONLY)
        content = "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError("the content of a message is a text, or a list of texts")
    written["content"] = content or ""
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        written["tool_calls"] = [_call(call) for call in calls]
    elif content is None:
        raise ValueError("every message needs a role and a content")
    return written


def _call(call: Any) -> Any:
    """As vLLM hands it to templates."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
