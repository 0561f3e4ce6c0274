# SPDX-License-Identifier: Apache-2.0
"""Wrappers that make presses cheap and repeatable, and change nothing else."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from kvpress.presses.base_press import BasePress
from kvpress.presses.scorer_press import ScorerPress

Memo = dict[Hashable, torch.Tensor]
"""Scores of one prompt, by scorer and layer."""


class SharedScorer(ScorerPress):  # type: ignore[misc]
    """Scores once for all presses and budgets that use the same scores.

    Args:
        press: A scorer whose scores do not depend on its ratio.
        key: Tells scorers with other options apart.
        memo: Of the prompt.
    """

    def __init__(self, press: ScorerPress, key: Hashable, memo: Memo) -> None:
        super().__init__(press.compression_ratio)
        self._press = press
        self._key = key
        self._memo = memo

    def post_init_from_model(self, model: Any) -> None:
        self._press.post_init_from_model(model)

    def score(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        key = (self._key, module.layer_idx)
        if key not in self._memo:
            self._memo[key] = self._press.score(module, *args, **kwargs)
        # A copy: presses write into scores.
        return self._memo[key].clone()


class Seeded(BasePress):  # type: ignore[misc]
    """Runs a press that draws from torch's own generator with a seed of its own in every layer."""

    def __init__(self, press: BasePress, seed: int) -> None:
        self.press = press
        self.seed = seed

    def post_init_from_model(self, model: Any) -> None:
        self.press.post_init_from_model(model)

    def layer_seed(self, module: Any) -> int:
        return self.seed + 1_000_003 * int(module.layer_idx)

    def compress(
        self, module: torch.nn.Module, hidden_states: torch.Tensor, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden_states.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.layer_seed(module))
            result: tuple[torch.Tensor, torch.Tensor] = self.press.compress(
                module, hidden_states, *args
            )
        return result
