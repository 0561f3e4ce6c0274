# SPDX-License-Identifier: Apache-2.0
"""OnlineRenderer: find what a chat protects by role, while its messages are at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch

if TYPE_CHECKING:
    from vllm.renderers.online_renderer import OnlineRenderer


def _wrap_preprocess_chat(original: Callable[..., Any]) -> Callable[..., Any]:
    async def preprocess_chat(
        self: OnlineRenderer,
        request: Any,
        messages: list[Any],
        *args: Any,
        tool_dicts: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        from ems_vllm.engine.frontend.chat_roles import protect_roles

        rendered = await original(self, request, messages, *args, tool_dicts=tool_dicts, **kwargs)
        # The same template and arguments; a parser would change the request once more.
        render = partial(_render, partial(original, self), *args, **{**kwargs, "parser": None})
        await protect_roles(self.renderer.config, request, messages, tool_dicts, rendered, render)
        return rendered

    return preprocess_chat


async def _render(
    preprocess: Callable[..., Any],
    *args: Any,
    request: Any,
    messages: list[Any],
    tool_dicts: list[dict[str, Any]] | None,
    **kwargs: Any,
) -> Any:
    return await preprocess(request, messages, *args, tool_dicts=tool_dicts, **kwargs)


PATCHES = (
    Patch(
        target="vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        wrap=_wrap_preprocess_chat,
        vllm=">=0.32.0,<0.33",
        source_sha256={
            "0.32.0": "6fbc03ba74afe54eb36dab8a557c05bd8df744675848d7317a1fb500f10dd1be"
        },
        reason=(
            "Which tokens a message became is known nowhere: they are found by rendering parts of "
            "the conversation in the same way."
        ),
        remove_when="renderers say which tokens a message became",
    ),
)
