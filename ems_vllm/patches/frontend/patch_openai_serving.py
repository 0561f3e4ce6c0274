# SPDX-License-Identifier: Apache-2.0
"""The OpenAI API's handlers: refuse bad `vllm_xargs` in time for an HTTP 400; say what was held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version


def _wrap_create(original: Callable[..., Any]) -> Callable[..., Any]:
    async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from ems_vllm.engine.frontend.request_check import check_api_request
        from ems_vllm.engine.frontend.usage import Usage, noting, with_usage

        recipe = check_api_request(self.engine_client.vllm_config, request)
        if recipe is None:
            return await original(self, request, *args, **kwargs)
        usage = Usage(recipe)
        with noting(usage):
            answer = await original(self, request, *args, **kwargs)
        return with_usage(answer, usage)

    return create


_USAGE = " And only here both what a request held and its answer are at hand."
_BEAMS = "Beam search makes parameters of its own for every step, without `vllm_xargs`." + _USAGE


def _patch(target: str, reason: str, *sha256: str) -> Patch:
    return Patch(
        target=f"vllm.entrypoints.{target}",
        wrap=_wrap_create,
        source_sha256=by_version(*sha256),
        process=Process.FRONTEND,
        reason=reason,
        upstream="#18179 (open): plugins of the OpenAI server",
        remove_when="general plugins can validate requests of the API, and add to its answers",
    )


PATCHES = (
    _patch(
        "openai.completion.serving:OpenAIServingCompletion.create_completion",
        _BEAMS,
        "ee7031242f030436a53c342516c45cb730fb525496663aa04323dfa651db6389",
    ),
    _patch(
        "openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
        _BEAMS,
        "2094795135f0010996e3f234d69ba84b9a66a3a9a989d8c37ae597cf19b5bfac",
    ),
    _patch(
        "openai.responses.serving:OpenAIServingResponses.create_responses",
        "AsyncLLM.generate is called when the answer has begun: a stream would break off, and a "
        "background response stay queued for ever." + _USAGE,
        "e541cdd9d6094cc07dd6ff1978a7127738e641069e92c0162ff21b97fbe584a3",
    ),
    _patch(
        "generate.generative_scoring.serving:ServingGenerativeScoring.create_generative_scoring",
        "Scores are read off the prompt with parameters of vLLM's own, without `vllm_xargs`.",
        "fd80e23a845c3ddc738239cfdcf8321e8534963f21de2c0c2f168882e6e52204",
        "9bc13d69f58e799a50788eee6b1a96733237c63815ce08f777920a466872a246",
    ),
)
