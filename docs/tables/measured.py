# SPDX-License-Identifier: Apache-2.0
"""From results to `configs/measured/`: what `ems-vllm methods` knows of the recipes that ship."""

from __future__ import annotations

from typing import Any

import yaml

from ems_vllm.config import recipes
from tables.markdown import read

_SOURCES = {
    "smollm2": ("SmolLM2-135M-Instruct", "methods-smollm2-4k.json"),
    "gemma3-270m": ("Gemma 3 270M", "methods-gemma3-270m-4k.json"),
}
_TIMES = "methods-cpu.json"
_FOCUS = "ems"
_HEAD = (
    "# SPDX-License-Identifier: Apache-2.0\n"
    "# Written by docs/generate.py from benchmarks/results/; change nothing here.\n"
)
_GROUPS = {"last": "last", "first": "first", "later": "later", "continuation": "text"}


def files() -> dict[str, str]:
    """YAML by name: the losses on each model, and the times of a compaction."""
    found = {name: _losses(model, source) for name, (model, source) in _SOURCES.items()}
    written = {f"{name}.yaml": _written(data, None) for name, data in found.items()}
    return written | {"compaction.yaml": _written(_times(), False)}


def _losses(model: str, source: str) -> dict[str, Any]:
    lab = read(source)
    found: dict[str, dict[str, Any]] = {}
    for one in lab["summaries"]:
        if one["variant"] in recipes.names() and one["group"] in _GROUPS:
            values: dict[str, Any] = {"loss": round(one["loss_above_full"], 4)}
            if one["of"]:
                values["right"] = [one["right"], one["of"]]
            of_recipe = found.setdefault(one["variant"], {})
            of_recipe.setdefault(one["budget"], {})[_GROUPS[one["group"]]] = values
    return {
        "model": model,
        "what": lab["what"],
        "source": source,
        "budgets": lab["budgets"],
        "recipes": {name: found[name] for name in recipes.names() if name in found},
    }


def _times() -> dict[str, Any]:
    seconds = read(_TIMES)["seconds"]
    relative = {
        name: float(f"{seconds[name] / seconds[_FOCUS]:.2g}")
        for name in recipes.names()
        if name in seconds
    }
    return {"source": _TIMES, "recipes": relative}


def _written(data: dict[str, Any], flow: bool | None) -> str:
    # None writes what is innermost on one line.
    return _HEAD + yaml.safe_dump(data, sort_keys=False, default_flow_style=flow, width=90)
