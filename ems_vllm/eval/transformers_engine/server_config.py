# SPDX-License-Identifier: Apache-2.0
"""What a server of an evaluation would be set up with, and what it would be asked for."""

from __future__ import annotations

from typing import Any

from ems_vllm.config import ConfigError, KVCompressionConfig, RequestOptions, load_config
from ems_vllm.config.errors import shown
from ems_vllm.eval.records.budget import kv_budget, largest_kv_budget, smallest_total
from ems_vllm.eval.records.method import FULL, Method
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.records.server_settings import ServerSettings


def request_options(
    method: Method, prompt: PromptLine, config: KVCompressionConfig, block_size: int
) -> RequestOptions | None:
    """What a request with this prompt asks for; None where the budget has no room for it.

    Args:
        method: Recipe and budget.
        prompt: Its length decides about the budget.
        config: The server's.
        block_size: The server's.
    """
    total = method.budget.total(prompt.budget_length)
    if method.is_full or total is None:
        return RequestOptions(enabled=False)
    # As for a server, by the cell: some of its prompts might have room, others not.
    if total < smallest_total(config.recent_window, block_size):
        return None
    prompt_len = len(prompt.prompt_token_ids)
    return RequestOptions(budget=kv_budget(total, prompt_len, config.recent_window, block_size))


def server_config(
    recipe: str, largest_total: int, overrides: dict[str, Any], block_size: int
) -> KVCompressionConfig:
    """Settings under which requests may hold up to `largest_total` entries per kv_head.

    Args:
        recipe: Name or file; FULL gives settings too, which its requests switch off.
        largest_total: Sinks and recent window included.
        overrides: Of KVCompressionConfig.
        block_size: Of the server.

    Raises:
        ConfigError: a setting is wrong.
    """
    known = "ems" if recipe == FULL else recipe
    server = ServerSettings(block_size=block_size)
    settings = {"recipe": known, **server.recipe_overrides(largest_total), **overrides}
    window = settings["recent_window"]
    if not isinstance(window, int):
        raise ConfigError(f"recent_window={shown(window)} is not allowed: give a whole number.")
    settings["budget"] = largest_kv_budget(largest_total, window, block_size)
    config = load_config(settings)
    if config is None:
        raise ConfigError(f"recipe={shown(recipe)} compresses nothing: name a recipe, or {FULL}.")
    return config
