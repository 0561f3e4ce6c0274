# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: refuse bad `vllm_xargs` before a streamed answer has begun; note what is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ems_vllm.patches.record import Patch, Process
from ems_vllm.vllm_versions import by_version

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


def _wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    # Not a coroutine: the check runs in the call, the generator with the first iteration.
    def generate(
        self: AsyncLLM, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from ems_vllm.engine.frontend.request_check import check_prompt, check_request
        from ems_vllm.engine.frontend.usage import noted

        check_request(self.vllm_config, sampling_params)
        check_prompt(self.vllm_config, prompt, sampling_params)
        return noted(original(self, prompt, sampling_params, *args, **kwargs))

    return generate


PATCHES = (
    Patch(
        target="vllm.v1.engine.async_llm:AsyncLLM.generate",
        wrap=_wrap_generate,
        source_sha256=by_version(
            "5bd0ee90459b0e29348891b03548cdc31eef8c9218b3c416d5df4e5e14d1bca2",
            "f8205b7b520cf747f0cf4e41ef5a3c5eeb3d5d9da4c5910b337a40607564d8d2",
        ),
        process=Process.FRONTEND,
        reason=(
            "A streamed answer has its status 200 before the request reaches InputProcessor, so an "
            "error there is an event in the stream. An error in the call itself is still a 400. "
            "What its outputs say of the cache goes into the usage of the answer."
        ),
        upstream="none filed",
        remove_when="vLLM validates requests before it begins to stream",
    ),
)
