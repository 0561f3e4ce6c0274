# SPDX-License-Identifier: Apache-2.0
"""Checks the compression settings of a request in the frontend."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from ems_vllm.config import ConfigError, RequestOptions
from ems_vllm.engine.active_config import active_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_request(vllm_config: VllmConfig, params: Any) -> None:
    """Refuse a request whose `vllm_xargs` ask for what this server cannot do.

    Args:
        vllm_config: Of the engine that will run the request.
        params: Its SamplingParams (or PoolingParams, which carry no such settings).

    Raises:
        VLLMValidationError: an HTTP 400 with the key, the value and what is allowed.
    """
    from vllm.exceptions import VLLMValidationError

    extra_args = getattr(params, "extra_args", None)
    if not extra_args:
        return
    config = active_config(vllm_config)
    if config is None:
        return
    try:
        RequestOptions.parse(extra_args).check_ceiling(config.plan_settings)
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def check_prompt(vllm_config: VllmConfig, prompt: Any, params: Any) -> None:
    """Refuse a prompt that is still growing, as `check_resumable`, before it is taken apart.

    Args:
        vllm_config: Of the engine that will run the request.
        prompt: As it is given to AsyncLLM.generate.
        params: The request's SamplingParams, which parts of the prompt without their own share.

    Raises:
        VLLMValidationError: the prompt is a stream and would be compressed.
    """
    if isinstance(prompt, AsyncGenerator):
        check_resumable(vllm_config, params)


def check_resumable(vllm_config: VllmConfig, params: Any) -> None:
    """Refuse a part of a prompt that is still growing while its request runs.

    Scheduler and workers compute the plan from the prompt's length, each on its own.

    Args:
        vllm_config: Of the engine that will run the request.
        params: SamplingParams of this part.

    Raises:
        VLLMValidationError: the request would be compressed.
    """
    from vllm.exceptions import VLLMValidationError

    config = active_config(vllm_config)
    if config is None:
        return
    if RequestOptions.parse(getattr(params, "extra_args", None)).enabled:
        raise VLLMValidationError(
            f"A streamed prompt cannot be combined with kv_compression={config.recipe!r}: send the "
            "whole prompt, or vllm_xargs.kv_compression='off' with every part of it.",
            parameter="prompt",
        )
