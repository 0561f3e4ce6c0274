# SPDX-License-Identifier: Apache-2.0
"""Checks the compression settings of a request in the frontend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from ems_vllm.config import RequestOptions, settings_of
from ems_vllm.config.errors import RequestError, shown
from ems_vllm.config.protect import KEY
from ems_vllm.engine.frontend.metrics import record_refusal

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.exceptions import VLLMValidationError

    from ems_vllm.config import KVCompressionConfig


def check_request(vllm_config: VllmConfig, params: Any) -> None:
    """Refuse a request whose `vllm_xargs` ask for what this server cannot do.

    Args:
        vllm_config: Of the engine that will run the request.
        params: Its SamplingParams (or PoolingParams, which carry no such settings).

    Raises:
        VLLMValidationError: an HTTP 400 with the key, the value and what is allowed.
    """
    extra_args = getattr(params, "extra_args", None)
    if extra_args and settings_of(vllm_config) is not None:
        options_of(vllm_config, extra_args)


def check_api_request(vllm_config: VllmConfig, request: Any) -> str | None:
    """Refuse what `check_request` refuses, and beams, before an answer has begun.

    Every step of a beam is a prompt of its own, and a prompt attends to its whole cache.

    Args:
        vllm_config: Of the engine that will run the request.
        request: As the API received it.

    Returns:
        Its recipe, or "off" where it is not compressed; None on a server that compresses nothing.

    Raises:
        VLLMValidationError: an HTTP 400 with the key, the value and what is allowed.
    """
    config = settings_of(vllm_config)
    if config is None:
        return None
    # Where the API has no such field, vLLM keeps what a client sent all the same.
    options = options_of(vllm_config, getattr(request, "vllm_xargs", None))
    if options.enabled and getattr(request, "use_beam_search", False):
        remedy = "; send vllm_xargs.kv_compression='off' with it" if config.allow_off else ""
        raise refusal(
            vllm_config,
            f"use_beam_search=True cannot be combined with kv_compression={config.recipe!r}: beams "
            f"attend to their whole cache{remedy}, or drop use_beam_search.",
            parameter="use_beam_search",
            reason="use_beam_search",
        )
    return config.recipe if options.enabled else "off"


def check_protection(vllm_config: VllmConfig, prompt_len: int, params: Any) -> None:
    """Refuse a request whose `kv_protect` the prompt, or its budget, has no room for.

    Args:
        vllm_config: Of the engine that will run the request.
        prompt_len: Tokens of its prompt.
        params: Its SamplingParams (or PoolingParams, which carry no such settings).

    Raises:
        VLLMValidationError: an HTTP 400 with the key, the numbers and the remedy.
    """
    extra_args = getattr(params, "extra_args", None)
    if not extra_args or not extra_args.get(KEY):
        return
    config = settings_of(vllm_config)
    if config is None:
        return
    options = options_of(vllm_config, extra_args)
    if options.protect:
        max_tokens = getattr(params, "max_tokens", None)
        check_room(vllm_config, config, options, prompt_len, max_tokens)


def check_room(
    vllm_config: VllmConfig,
    config: KVCompressionConfig,
    options: RequestOptions,
    prompt_len: int,
    max_tokens: int | None,
    setting: str | None = None,
) -> None:
    """Refuse a request with more to protect than it keeps.

    Args:
        options: Of the request.
        prompt_len: Tokens of its prompt.
        max_tokens: Of its answer; None for as many as the model's length allows.
        setting: See Protect.check.

    Raises:
        VLLMValidationError: an HTTP 400 with the key, the numbers and the remedy.
    """
    if not options.protect:
        return
    model = vllm_config.model_config
    num_tokens = model.max_model_len if max_tokens is None else prompt_len + max_tokens
    settings = config.plan_settings_of(model.get_total_num_hidden_layers())
    block_size = vllm_config.cache_config.block_size
    plans = [level.plan(prompt_len, block_size, options) for _, level in settings.levels()]
    num_sinks = config.selector.num_sink_tokens
    try:
        options.protect.check(prompt_len, num_tokens, plans, num_sinks, setting)
    except RequestError as error:
        raise refusal(vllm_config, str(error), "vllm_xargs", error.reason) from None


def options_of(vllm_config: VllmConfig, extra_args: Any) -> RequestOptions:
    """What a request may have of what it asks for.

    Args:
        vllm_config: Of a server with compression.
        extra_args: Its `vllm_xargs`.

    Raises:
        VLLMValidationError: it may not have it.
    """
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise refusal(
            vllm_config,
            f"vllm_xargs={shown(extra_args)} is not allowed: send an object.",
            parameter="vllm_xargs",
            reason="no_object",
        )
    config = settings_of(vllm_config)
    assert config is not None, "a request was checked on a server without compression"
    try:
        options = RequestOptions.parse(extra_args)
        options.check_ceiling(config.plan_settings)
    except RequestError as error:
        raise refusal(vllm_config, str(error), "vllm_xargs", error.reason) from None
    return options


def refusal(
    vllm_config: VllmConfig, message: str, parameter: str, reason: str
) -> VLLMValidationError:
    """Becomes an HTTP 400, and is counted.

    Args:
        message: With the key, the value and the remedy.
        parameter: What it is about, for the client.
        reason: One of few, for statistics.
    """
    from vllm.exceptions import VLLMValidationError

    record_refusal(vllm_config, reason)
    return VLLMValidationError(message, parameter=parameter)


def check_prompt(vllm_config: VllmConfig, prompt: Any, params: Any) -> None:
    """Refuse a prompt that is still growing, as `check_resumable`, before it is taken apart.

    Where its tokens are known, so is what it protects: a streamed answer has not begun.

    Args:
        vllm_config: Of the engine that will run the request.
        prompt: As it is given to AsyncLLM.generate.
        params: The request's SamplingParams, which parts of the prompt without their own share.

    Raises:
        VLLMValidationError: the prompt is a stream and would be compressed, or `check_protection`.
    """
    if isinstance(prompt, AsyncGenerator):
        check_resumable(vllm_config, params)
    elif isinstance(prompt, Mapping) and prompt.get("prompt_token_ids") is not None:
        check_protection(vllm_config, len(prompt["prompt_token_ids"]), params)


def check_resumable(vllm_config: VllmConfig, params: Any) -> None:
    """Refuse a part of a prompt that is still growing while its request runs.

    Scheduler and workers compute the plan from the prompt's length, each on its own.

    Args:
        vllm_config: Of the engine that will run the request.
        params: SamplingParams of this part.

    Raises:
        VLLMValidationError: the request would be compressed.
    """
    config = settings_of(vllm_config)
    if config is None:
        return
    if RequestOptions.parse(getattr(params, "extra_args", None)).enabled:
        raise refusal(
            vllm_config,
            f"A streamed prompt cannot be combined with kv_compression={config.recipe!r}: send the "
            "whole prompt, or vllm_xargs.kv_compression='off' with every part of it.",
            parameter="prompt",
            reason="streamed_prompt",
        )
