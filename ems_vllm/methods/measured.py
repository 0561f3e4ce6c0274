# SPDX-License-Identifier: Apache-2.0
"""What was measured of the recipes that ship; docs/generate.py writes `configs/measured/`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

MODEL = "smollm2"


@dataclass(frozen=True)
class Measured:
    """Of one recipe.

    Attributes:
        model: On which.
        losses: By budget (a fraction of the prompt) and protocol: loss of the right answer above
            the full cache's, nats per token; "text" is running text.
        right: By budget and protocol that asks questions: answers right, of those that the full
            cache has right.
        cost: Time of a compaction, that of `ems` being 1.
    """

    model: str
    losses: dict[str, dict[str, float]]
    right: dict[str, dict[str, tuple[int, int]]]
    cost: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "model": self.model,
            "loss_above_full": self.losses,
            "right_of": {
                budget: {group: list(counts) for group, counts in of_budget.items()}
                for budget, of_budget in self.right.items()
            },
            "compaction_time": self.cost,
        }


@cache
def described() -> dict[str, Any]:
    """The file: how it was measured, and by recipe the figures."""
    path = resources.files("ems_vllm.configs") / "measured" / f"{MODEL}.yaml"
    if not path.is_file():
        return {"recipes": {}}
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def measured(recipe: str) -> Measured | None:
    """What was measured of a recipe; None for nothing."""
    found = described()
    of_recipe = found["recipes"].get(recipe)
    if of_recipe is None:
        return None
    losses, right = {}, {}
    for budget, groups in of_recipe["budgets"].items():
        losses[budget] = {group: values["loss"] for group, values in groups.items()}
        right[budget] = {
            group: tuple(values["right"]) for group, values in groups.items() if "right" in values
        }
    return Measured(found["model"], losses, right, of_recipe.get("cost"))
