# SPDX-License-Identifier: Apache-2.0
"""The OpenAI API's handlers: refuse bad `vllm_xargs` where the answer can still be an HTTP 400."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ems_vllm.patches.record import Patch


def _wrap_create(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from ems_vllm.engine.frontend.request_check import check_api_request

        check_api_request(self.engine_client.vllm_config, request)
        return await original(self, request, *args, **kwargs)

    return create


_BEAMS = "Beam search makes parameters of its own for every step, without `vllm_xargs`."


def _patch(target: str, sha256: str, reason: str) -> Patch:
    return Patch(
        target=f"vllm.entrypoints.{target}",
        wrap=_wrap_create,
        vllm=">=0.32.0,<0.33",
        source_sha256={"0.32.0": sha256},
        reason=reason,
        remove_when="general plugins can validate requests of the API",
    )


PATCHES = (
    _patch(
        "openai.completion.serving:OpenAIServingCompletion.create_completion",
        "ee7031242f030436a53c342516c45cb730fb525496663aa04323dfa651db6389",
        _BEAMS,
    ),
    _patch(
        "openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
        "2094795135f0010996e3f234d69ba84b9a66a3a9a989d8c37ae597cf19b5bfac",
        _BEAMS,
    ),
    _patch(
        "openai.responses.serving:OpenAIServingResponses.create_responses",
        "e541cdd9d6094cc07dd6ff1978a7127738e641069e92c0162ff21b97fbe584a3",
        "AsyncLLM.generate is called when the answer has begun: a stream would break off, and a "
        "background response stay queued for ever.",
    ),
    _patch(
        "generate.generative_scoring.serving:ServingGenerativeScoring.create_generative_scoring",
        "fd80e23a845c3ddc738239cfdcf8321e8534963f21de2c0c2f168882e6e52204",
        "Scores are read off the prompt with parameters of vLLM's own, without `vllm_xargs`.",
    ),
)
