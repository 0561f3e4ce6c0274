# SPDX-License-Identifier: Apache-2.0
"""Budgets that are compared: those that were asked for, or some that suit the traffic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ems_vllm.advise.quantiles import quantile
from ems_vllm.config import ConfigError, KVCompressionConfig, load_config
from ems_vllm.config.errors import shown
from ems_vllm.config.recipes import OFF
from ems_vllm.eval.records.budget import Budget

# Of the prompts that 95 % do not exceed (ours): where budgets are compared by the evaluation, too.
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_RATIOS = (0.125, 0.25)
_LEAST = 64
_SIZES = ("budget", "ratio")


@dataclass(frozen=True)
class Candidate:
    """Settings of a server.

    Attributes:
        label: The size in words.
        given: What is set beside the recipe.
        config: All of it.
    """

    label: str
    given: dict[str, Any]
    config: KVCompressionConfig


def candidates(
    recipe: str,
    settings: dict[str, Any],
    budgets: Sequence[str],
    prompt_lens: Sequence[int],
) -> list[Candidate]:
    """One for each size.

    Args:
        recipe: Name or file.
        settings: Of KVCompressionConfig, for all.
        budgets: Entries (1024) or fractions of a prompt (0.25), as the settings `budget` and
            `ratio`; none for a choice by the lengths.
        prompt_lens: Of the traffic, at least one.

    Raises:
        ConfigError: a budget or a setting is wrong.
    """
    if recipe == OFF:
        raise ConfigError(f"recipe={shown(recipe)} compresses nothing: name a recipe.")
    for key in _SIZES:
        if settings.get(key) is not None:
            raise ConfigError(
                f"config.{key}={shown(settings[key])} is not allowed: sizes come from --budget."
            )
    sizes = [_size(text) for text in budgets] if budgets else list(_usual(prompt_lens))
    return [_candidate(recipe, settings, size) for size in dict.fromkeys(sizes)]


def _size(text: str) -> Budget:
    size = Budget.parse(text)
    if size == Budget():
        raise ConfigError(
            "budget='full' is not allowed: the dense cache is always shown; give entries (1024) or "
            "a fraction of the prompt (0.25)."
        )
    return size


def _usual(prompt_lens: Sequence[int]) -> Iterable[Budget]:
    """Powers of two near shares of the long prompts, and fractions of any."""
    long = quantile(prompt_lens, 0.95)
    for share in _SHARES:
        yield Budget(count=max(_LEAST, 2 ** round(math.log2(max(1.0, share * long)))))
    for ratio in _RATIOS:
        yield Budget(fraction=ratio)


def _candidate(recipe: str, settings: dict[str, Any], size: Budget) -> Candidate:
    given: dict[str, Any]
    if size.count is not None:
        label, given = f"{size.count:,}", {"budget": size.count}
    else:
        label, given = f"{100 * (size.fraction or 0):.3g} %", {"ratio": size.fraction}
    config = load_config({"recipe": recipe, **settings, **given})
    assert config is not None
    return Candidate(label, {**settings, **given}, config)
