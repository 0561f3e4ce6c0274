# SPDX-License-Identifier: Apache-2.0
"""A way of keeping the cache at one budget, and what it asks of a server for a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ems_vllm.config import KVCompressionConfig, RequestOptions
from ems_vllm.eval.questions.sample import Sample
from ems_vllm.eval.records.budget import Budget, kv_budget, largest_kv_budget, smallest_total
from ems_vllm.eval.records.preset import FULL, ServerSettings

_ALL = Budget()


@dataclass(frozen=True)
class Method:
    """A recipe at a budget; recipe "full" keeps everything."""

    recipe: str
    budget: Budget = _ALL

    @property
    def is_full(self) -> bool:
        return self.recipe == FULL

    def __str__(self) -> str:
        return FULL if self.is_full else f"{self.recipe} {self.budget}"

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


def compression_overrides(total: int, server: ServerSettings) -> dict[str, Any]:
    """Settings beside the recipe of a server whose requests hold at most `total` entries."""
    return {
        "budget": largest_kv_budget(total, server.recent_window, server.block_size),
        "recent_window": server.recent_window,
        "obs_window": server.obs_window,
        "recompress_interval": server.recompress_interval,
        # Otherwise a prompt just above its budget would be kept whole.
        "min_blocks_saved": 1,
        **server.compression,
    }


def blocks_held(
    config: KVCompressionConfig | None, prompt_len: int, budget: int | None, block_size: int
) -> int:
    """Blocks of a request once its prompt is processed, by the plan; see `ems-vllm plan`.

    A mean over the layers: where they share a budget unequally, it is what each would hold of equal
    shares, up to what is rounded down to whole blocks.
    """
    dense = -(-(prompt_len + 1) // block_size)
    if config is None or budget is None:
        return dense
    plan: Any = config.plan_settings.plan(prompt_len, block_size, RequestOptions(budget=budget))
    return dense - int(plan.columns(prompt_len)[0])
