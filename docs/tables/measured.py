# SPDX-License-Identifier: Apache-2.0
"""From results to `configs/measured/`: what `ems-vllm methods` knows of the recipes that ship."""

from __future__ import annotations

from typing import Any

import yaml

from ems_vllm.config import recipes
from tables.markdown import read

_SOURCE, _COSTS = "methods-smollm2-4k.json", "methods-cpu.json"
_FOCUS = "ems"
_HEAD = (
    "# SPDX-License-Identifier: Apache-2.0\n"
    "# Written by docs/generate.py from benchmarks/results/; change nothing here.\n"
)
_GROUPS = {"last": "last", "first": "first", "later": "later", "continuation": "text"}


def measured() -> str:
    """A YAML file."""
    lab, costs = read(_SOURCE), read(_COSTS)["seconds"]
    found: dict[str, dict[str, Any]] = {}
    for one in lab["summaries"]:
        if one["variant"] in recipes.names() and one["group"] in _GROUPS:
            of_recipe = found.setdefault(one["variant"], {})
            values: dict[str, Any] = {"loss": round(one["loss_above_full"], 4)}
            if one["of"]:
                values["right"] = [one["right"], one["of"]]
            of_recipe.setdefault(one["budget"], {})[_GROUPS[one["group"]]] = values
    written = {
        "model": "SmolLM2-135M-Instruct",
        "what": lab["what"],
        "source": _SOURCE,
        "budgets": lab["budgets"],
        "recipes": {
            name: {
                "budgets": found.get(name, {}),
                **({"cost": float(f"{costs[name] / costs[_FOCUS]:.2g}")} if name in costs else {}),
            }
            for name in recipes.names()
            if name in found or name in costs
        },
    }
    return _HEAD + yaml.safe_dump(written, sort_keys=False, default_flow_style=None, width=90)
