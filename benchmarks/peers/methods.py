# SPDX-License-Identifier: Apache-2.0
"""Which press at which budget; a file of answers each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.results import MethodResult
from peers import presses


@dataclass(frozen=True)
class Method:
    """A press at a budget; the full cache is a method of its own."""

    press: str
    budget: Budget

    @property
    def file_name(self) -> str:
        return f"kvpress-{self.press}-{self.budget}.jsonl".replace("full-full", "full")

    def entries(self, length: int, prompt_len: int) -> int | None:
        """Entries to keep of a prompt of `prompt_len` tokens; None for all of them."""
        total = self.budget.total(length)
        return total if total is not None and total < prompt_len else None

    def describe(self) -> MethodResult:
        """Itself as a result without samples."""
        return MethodResult(
            method=self.press,
            engine="kvpress",
            budget=self.budget.count,
            budget_fraction=self.budget.fraction,
        )


def methods(press_names: Sequence[str], budgets: Sequence[Budget]) -> list[Method]:
    """Every press at every budget, and the full cache once."""
    chosen = []
    for name in press_names:
        if name == presses.FULL:
            chosen.append(Method(name, Budget()))
        else:
            chosen += [Method(name, budget) for budget in budgets if budget != Budget()]
    return list(dict.fromkeys(chosen))
