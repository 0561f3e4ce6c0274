# SPDX-License-Identifier: Apache-2.0
"""InputProcessor: refuse bad `vllm_xargs` where that becomes an HTTP 400."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    from vllm.v1.engine.input_processor import InputProcessor


def _wrap_process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from ems_vllm.engine.frontend.request_check import (
            check_protection,
            check_request,
            check_resumable,
        )

        check_request(self.vllm_config, params)
        # Every part of a streamed prompt comes here, with parameters of its own.
        if kwargs.get("resumable"):
            check_resumable(self.vllm_config, params)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        # Only now its tokens are known, whatever the prompt was.
        embeds = request.prompt_embeds
        tokens = request.prompt_token_ids if embeds is None else embeds
        check_protection(self.vllm_config, len(tokens), request.sampling_params)
        return request

    return process_inputs


PATCHES = (
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        wrap=_wrap_process_inputs,
        source_sha256=by_version(
            "e22b5f772979054c158de62fa720f7a03db03382a91902852c9148d0144cd27b"
        ),
        process=Process.FRONTEND,
        reason=(
            "Only a platform (validate_request) or a logits processor (validate_params) may check "
            "a request's extra arguments before the engine sees it; we are neither on CUDA."
        ),
        upstream="none filed",
        remove_when="general plugins can validate requests",
    ),
)
