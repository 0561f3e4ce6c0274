# SPDX-License-Identifier: Apache-2.0
"""Variants at budgets, each with a digest of all that its measurements depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ems_vllm.eval.budget import Budget
from ems_vllm.eval.reference.methods import Method

if TYPE_CHECKING:
    from ems_vllm.config import KVCompressionConfig, RequestOptions
    from ems_vllm.eval.exchange import PromptLine


@dataclass(frozen=True)
class Cell:
    """A variant at a budget.

    Attributes:
        variant: Its name.
        budget: Entries per kv_head in all.
        config: The server's.
        digest: Equal for equal settings, whatever the variant is called. Another one after a change
            of the code, so that what was measured before is measured again.
    """

    variant: str
    budget: Budget
    config: KVCompressionConfig
    digest: str

    def options(self, prompt: PromptLine, block_size: int) -> RequestOptions | None:
        """What a request asks for; None where the budget has no room for it."""
        return Method(self.variant, self.budget).options(prompt, self.config, block_size)


def cells(
    configs: Mapping[str, KVCompressionConfig], budgets: Sequence[Budget], errors: bool
) -> list[Cell]:
    """All variants at all budgets, budget by budget.

    Args:
        configs: By the name of the variant.
        budgets: Entries per kv_head in all.
        errors: Whether errors of attention are measured.
    """
    found = []
    for budget in budgets:
        for name, config in configs.items():
            # Its name in the recipe changes nothing.
            settings = {**config.to_dict(), "recipe": ""}
            depends = json.dumps([_code(), settings, str(budget), errors], sort_keys=True)
            found.append(Cell(name, budget, config, digest(depends)))
    return found


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_digest(prompt: PromptLine) -> str:
    """Of all that a prompt is."""
    return digest(prompt.model_dump_json())


@cache
def _code() -> str:
    """Digest of the code that measurements depend on, compiled operators included."""
    package = Path(str(resources.files("ems_vllm")))
    files = [package / "plan.py", package / "eval" / "budget.py", *package.glob("*.so")]
    for folder in ("policies", "ops", "eval/reference", "eval/lab"):
        files += (package / folder).rglob("*.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
