# SPDX-License-Identifier: Apache-2.0
"""OnlineRenderer: find what a chat protects by role, while its messages are at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

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
        source_sha256=by_version(
            "6fbc03ba74afe54eb36dab8a557c05bd8df744675848d7317a1fb500f10dd1be",
            "f4885ea9b147b4c9667baa168ca82e08980bc1f941bbbdbe5373a4cc60f9cccb",
        ),
        process=Process.FRONTEND,
        reason=(
            "Which tokens a message became is known nowhere: they are found by rendering parts of "
            "the conversation in the same way."
        ),
        upstream="none filed",
        remove_when="renderers say which tokens a message became",
    ),
)
