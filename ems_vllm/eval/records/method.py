# SPDX-License-Identifier: Apache-2.0
"""One way of keeping the cache, at one budget, in one engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ems_vllm.eval.questions.sample import Sample
from ems_vllm.eval.records.budget import Budget, kv_budget, largest_kv_budget, smallest_total
from ems_vllm.eval.records.results import MethodResult
from ems_vllm.eval.records.server_settings import ServerSettings

FULL = "full"
"""Name of the method that keeps everything."""

VLLM, TRANSFORMERS = "vllm", "transformers"
"""Names of the engines that run our recipes."""

_ALL = Budget()


@dataclass(frozen=True)
class Method:
    """A recipe, or a method of another engine, at a budget.

    Attributes:
        name: FULL, a recipe or its YAML file, or what another engine calls its method.
        engine: VLLM, TRANSFORMERS, or the library that runs it.
        budget: Entries per kv_head; all of them for the full cache.
    """

    name: str
    engine: str
    budget: Budget = _ALL

    @property
    def is_full(self) -> bool:
        return self.name == FULL

    @property
    def file_name(self) -> str:
        """Of its answers in a folder of answers."""
        budget = "" if self.is_full else f"-{self.budget}"
        return f"{self.engine}-{self.name}{budget}.jsonl"

    def __str__(self) -> str:
        return FULL if self.is_full else f"{self.name} {self.budget}"

    def describe(self) -> MethodResult:
        """Itself as a result without samples."""
        return MethodResult(
            method=self.name,
            engine=self.engine,
            budget=self.budget.count,
            budget_fraction=self.budget.fraction,
        )

    def kv_budget(self, sample: Sample, prompt_len: int, server: ServerSettings) -> int | None:
        """What a request of this sample asks for; None where the budget is too small for it.

        Args:
            sample: Its length decides about the budget.
            prompt_len: Tokens of the request's prompt.
            server: Of all servers.
        """
        total = self._total(sample, server)
        window, block_size = server.recent_window, server.block_size
        if sample.compresses_writing:
            return largest_kv_budget(total, window, block_size)
        return kv_budget(total, prompt_len, window, block_size)

    def covers(self, sample: Sample, server: ServerSettings) -> bool:
        """Whether every prompt of the sample's cell has room for a block within the budget."""
        if self.is_full:
            return True
        smallest = smallest_total(server.recent_window, server.block_size)
        return self._total(sample, server) >= smallest

    def _total(self, sample: Sample, server: ServerSettings) -> int:
        """Entries right after a compression."""
        total = self.budget.total(sample.budget_length)
        assert total is not None
        if sample.compresses_writing:
            # A request that writes holds so many more before it is compressed again.
            total -= server.recompress_interval + server.block_size
        return total


def methods_of(names: Iterable[str], budgets: Sequence[Budget], engine: str) -> list[Method]:
    """Every method at every budget, each once; the full cache has one budget only."""
    chosen = []
    for name in names:
        if name == FULL:
            chosen.append(Method(name, engine))
        else:
            chosen += [Method(name, engine, budget) for budget in budgets if budget != _ALL]
    return list(dict.fromkeys(chosen))
