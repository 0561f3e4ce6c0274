# SPDX-License-Identifier: Apache-2.0
"""The recipes that ship: where each comes from, and what it needs."""

from __future__ import annotations

import re
from importlib import resources

from ems_vllm.config import load_config, recipes
from tables.markdown import table


def catalogue() -> str:
    """A row for each recipe."""
    rows = []
    for name in recipes.names():
        config = load_config(name)
        assert config is not None
        source, says = _comment(name)
        reads = "yes" if config.scorer.reads_queries else "no"
        merges = "yes" if config.merger.name() != "none" else "no"
        rows.append([f"`{name}`", source, says, reads, merges])
    return table(["recipe", "from", "what stays", "reads queries", "merges"], rows)


def _comment(recipe: str) -> tuple[str, str]:
    """Source and description, which a recipe's file begins with: "Name (arXiv ...): what"."""
    file = resources.files("ems_vllm.configs") / "policies" / f"{recipe}.yaml"
    lines = [
        line.removeprefix("# ")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("# ") and "SPDX" not in line and not line.startswith("# Any setting")
    ]
    source, _, says = " ".join(lines).partition(": ")
    number = re.compile(r"arXiv (\d+\.\d+)")
    return number.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source), says.rstrip(".")
