# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a chat's prompt a role is: found by rendering parts of the conversation (ours).

What the rendering of a part has in common with the prompt, from the start on, is that part. So
templates need not say where a message ends, and one that renders a message otherwise once others
follow it gives a shorter span, or none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config import settings_of
from ems_vllm.config.errors import shown
from ems_vllm.config.protect import KEY, Protect
from ems_vllm.engine.frontend.request_check import check_room, options_of, refusal
from ems_vllm.spans import merged

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ems_vllm.spans import Span

Render = Callable[[list[Any], "list[dict[str, Any]] | None", bool], Awaitable["list[int]"]]
"""Tokens of messages with tools, and of what asks for an answer where they are a whole prompt."""

_SYSTEM = ("system", "developer")
# Two users that say different things: what their prompts have in common comes before them.
_USERS = ([{"role": "user", "content": "A"}], [{"role": "user", "content": "7"}])


async def protect_roles(
    vllm_config: VllmConfig,
    request: Any,
    messages: list[Any],
    tools: list[dict[str, Any]] | None,
    rendered: Any,
    render: Callable[..., Any],
) -> None:
    """Replace the roles that a chat request protects by ranges of its prompt's tokens.

    Args:
        vllm_config: Of the engine that will run the request.
        request: As the API received it; its `vllm_xargs` are replaced.
        messages: Of the conversation.
        tools: As the template gets them; None for none.
        rendered: What vLLM made of the messages.
        render: The same for other messages, as keywords `request`, `messages`, `tool_dicts`.

    Raises:
        VLLMValidationError: an HTTP 400 where a role that the request names is not found, or what
            is protected has no room.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    config = settings_of(vllm_config)
    if config is None or not isinstance(request, ChatCompletionRequest):
        return
    options = options_of(vllm_config, request.vllm_xargs)
    is_own = options.protect is not None
    wanted = options.protect if options.protect is not None else Protect(roles=config.protect)
    if not options.enabled or not wanted.roles:
        return

    async def tokens_of(
        messages: list[Any], tools: list[dict[str, Any]] | None, is_whole: bool
    ) -> list[int]:
        update = {"add_generation_prompt": False, "continue_final_message": False}
        part = request.model_copy(update={} if is_whole else update)
        return _token_ids(await render(request=part, messages=messages, tool_dicts=tools))

    chat = Chat(messages, tools, _token_ids(rendered), tokens_of)
    ranges = list(wanted.ranges)
    for role in wanted.roles:
        span = await chat.span_of(role)
        if span is not None:
            ranges.append(span)
        elif is_own:
            sent = (request.vllm_xargs or {}).get(KEY)
            raise refusal(
                vllm_config,
                f"vllm_xargs.{KEY}={shown(sent)} is not allowed: {role!r} is not in the "
                "conversation, or the chat template does not show where; leave it out, or give a "
                "range of the prompt's tokens such as '0-128'.",
                parameter="vllm_xargs",
                reason=KEY,
            )
    found = Protect(merged(ranges))
    # What is found is sent, also where it is nothing: the server's roles are done with.
    request.vllm_xargs = {**(request.vllm_xargs or {}), KEY: list(found.sent())}
    setting = f"kv_compression_config.protect={list(config.protect)}"
    if is_own:
        setting = f"vllm_xargs.{KEY}={shown(wanted.sent())}"
    most = request.max_completion_tokens
    check_room(
        vllm_config,
        config,
        options_of(vllm_config, request.vllm_xargs),
        len(chat.token_ids),
        request.max_tokens if most is None else most,
        setting,
    )


@dataclass(frozen=True)
class Chat:
    """A conversation and its prompt.

    Attributes:
        messages: In order.
        tools: As the template gets them; None for none.
        token_ids: The prompt.
        render: For other messages and tools.
    """

    messages: list[Any]
    tools: list[dict[str, Any]] | None
    token_ids: list[int]
    render: Render

    async def span_of(self, role: str) -> Span | None:
        """The tokens of a role; None where it is not there, or not found."""
        find = {"system": self._system, "last_user": self._last_user, "tools": self._tools}[role]
        start, stop = await find()
        return (start, stop) if start < stop else None

    async def _system(self) -> Span:
        count = 0
        while count < len(self.messages) and _role(self.messages[count]) in _SYSTEM:
            count += 1
        return (0, await self._end_of(self.messages[:count])) if count else (0, 0)

    async def _last_user(self) -> Span:
        users = [at for at, message in enumerate(self.messages) if _role(message) == "user"]
        if not users:
            return (0, 0)
        # Some templates leave out of answers what was thought, once another question follows.
        start = await self._start_of_user(self.messages[: users[-1]])
        return (start, await self._end_of(self.messages[: users[-1] + 1]))

    async def _tools(self) -> Span:
        bare = await self._tokens(self.messages, None, True) if self.tools else None
        if bare is None:
            return (0, 0)
        start = _num_common(self.token_ids, bare)
        behind = _num_common(self.token_ids[start:][::-1], bare[start:][::-1])
        return (start, len(self.token_ids) - behind)

    async def _end_of(self, messages: list[Any]) -> int:
        """Tokens of the prompt that are those of its first messages."""
        alone = await self._tokens(messages, self.tools)
        if alone is not None:
            return _num_common(self.token_ids, alone)
        # Some templates take no conversation without a user.
        return await self._start_of_user(messages)

    async def _start_of_user(self, messages: list[Any]) -> int:
        """Tokens of the prompt before what a user says after its first messages; 0 if unknown."""
        common = self.token_ids
        for user in _USERS:
            with_user = await self._tokens([*messages, *user], self.tools)
            common = common[: 0 if with_user is None else _num_common(common, with_user)]
        return len(common)

    async def _tokens(
        self, messages: list[Any], tools: list[dict[str, Any]] | None, is_whole: bool = False
    ) -> list[int] | None:
        """None where the template takes no such conversation."""
        try:
            return await self.render(messages, tools, is_whole)
        except Exception:
            # A template may raise what it likes, and then the role is not found.
            return None


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)


def _token_ids(rendered: Any) -> list[int]:
    """Of the one prompt that a conversation became."""
    _, (prompt, *_) = rendered
    return list(prompt.get("prompt_token_ids") or ())


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
