# SPDX-License-Identifier: Apache-2.0
"""Which recipe at which budget, and what it means for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ems_vllm.config import ConfigError, KVCompressionConfig, RequestOptions, load_config
from ems_vllm.config.errors import shown
from ems_vllm.eval.records.budget import Budget, kv_budget, largest_kv_budget, smallest_total
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.records.results import MethodResult

FULL = "full"
# As the servers of an evaluation are set up: small windows, so that small budgets have room for
# more than the window, and no saving too small to be made.
_SERVER = {"recent_window": 16, "obs_window": 16, "recompress_interval": 256, "min_blocks_saved": 1}


@dataclass(frozen=True)
class Method:
    """A recipe at a budget; the full cache is a method of its own."""

    recipe: str
    budget: Budget

    @property
    def file_name(self) -> str:
        if self.recipe == FULL:
            return "transformers-full.jsonl"
        return f"transformers-{self.recipe}-{self.budget}.jsonl"

    def describe(self) -> MethodResult:
        """Itself as a result without samples."""
        return MethodResult(
            method=self.recipe,
            engine="transformers",
            budget=self.budget.count,
            budget_fraction=self.budget.fraction,
        )

    def options(
        self, prompt: PromptLine, config: KVCompressionConfig, block_size: int
    ) -> RequestOptions | None:
        """What a request with this prompt asks for; None where the budget has no room for it.

        Args:
            prompt: Its length decides about the budget.
            config: The server's.
            block_size: The server's.
        """
        total = self.budget.total(prompt.budget_length)
        if self.recipe == FULL or total is None:
            return RequestOptions(enabled=False)
        # As for a server, by the cell: some of its prompts might have room, others not.
        if total < smallest_total(config.recent_window, block_size):
            return None
        prompt_len = len(prompt.prompt_token_ids)
        return RequestOptions(budget=kv_budget(total, prompt_len, config.recent_window, block_size))


def methods(recipes: Sequence[str], budgets: Sequence[Budget]) -> list[Method]:
    """Every recipe at every budget, and the full cache once."""
    chosen = []
    for recipe in recipes:
        if recipe == FULL:
            chosen.append(Method(recipe, Budget()))
        else:
            chosen += [Method(recipe, budget) for budget in budgets if budget != Budget()]
    return list(dict.fromkeys(chosen))


def server_config(
    recipe: str, largest_total: int, overrides: dict[str, Any], block_size: int
) -> KVCompressionConfig:
    """Settings under which requests may hold up to `largest_total` entries per kv_head.

    Args:
        recipe: Name or file; "full" gives settings too, which its requests switch off.
        largest_total: Sinks and recent window included.
        overrides: Of KVCompressionConfig.
        block_size: Of the server.

    Raises:
        ConfigError: a setting is wrong.
    """
    known = "ems" if recipe == FULL else recipe
    settings = {"recipe": known, **_SERVER, **overrides}
    window = settings["recent_window"]
    if not isinstance(window, int):
        raise ConfigError(f"recent_window={shown(window)} is not allowed: give a whole number.")
    settings["budget"] = largest_kv_budget(largest_total, window, block_size)
    config = load_config(settings)
    if config is None:
        raise ConfigError(f"recipe={shown(recipe)} compresses nothing: name a recipe, or {FULL}.")
    return config
