# SPDX-License-Identifier: Apache-2.0
"""What was measured of the recipes that ship; docs/generate.py writes `configs/measured/`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

# The first is the one of which an overview shows figures.
MODELS = ("smollm2", "gemma3-270m")
_TIMES = "compaction"


@dataclass(frozen=True)
class Measured:
    """Of one recipe on one model.

    Attributes:
        model: On which.
        losses: By budget (a fraction of the prompt) and protocol: loss of the right answer above
            the full cache's, nats per token; "text" is running text.
        right: By budget and protocol that asks questions: answers right, of those that the full
            cache has right.
    """

    model: str
    losses: dict[str, dict[str, float]]
    right: dict[str, dict[str, tuple[int, int]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "model": self.model,
            "loss_above_full": self.losses,
            "right_of": {
                budget: {group: list(counts) for group, counts in of_budget.items()}
                for budget, of_budget in self.right.items()
            },
        }


def measured(recipe: str) -> dict[str, Measured]:
    """What was measured of a recipe, by model; nothing of those on which it was not."""
    found = {}
    for model in MODELS:
        in_model = described(model)
        budgets = in_model["recipes"].get(recipe)
        if budgets is not None:
            found[model] = _of_budgets(in_model["model"], budgets)
    return found


def compaction_time(recipe: str) -> float | None:
    """Of a recipe, that of `ems` being 1; None where it was not measured."""
    found: float | None = described(_TIMES)["recipes"].get(recipe)
    return found


def _of_budgets(model: str, budgets: dict[str, Any]) -> Measured:
    losses, right = {}, {}
    for budget, groups in budgets.items():
        losses[budget] = {group: values["loss"] for group, values in groups.items()}
        right[budget] = {
            group: tuple(values["right"]) for group, values in groups.items() if "right" in values
        }
    return Measured(model, losses, right)


@cache
def described(name: str = MODELS[0]) -> dict[str, Any]:
    """A file, of a model or of times: how it was measured, and by recipe the figures."""
    path = resources.files("ems_vllm.configs") / "measured" / f"{name}.yaml"
    if not path.is_file():
        return {"recipes": {}}
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
