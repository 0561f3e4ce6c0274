# SPDX-License-Identifier: Apache-2.0
"""From settings and a prompt length to the CompressionPlan that the scheduler follows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

from ems_vllm.layer_shares import LayerShares

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan


class SizeRequest(Protocol):
    """What a request asked for; see config.request.RequestOptions."""

    @property
    def enabled(self) -> bool: ...

    @property
    def budget(self) -> int | None: ...

    @property
    def ratio(self) -> float | None: ...


@dataclass(frozen=True)
class PlanSettings:
    """The part of the settings that decides which columns are compressed when.

    Attributes: see KVCompressionConfig. Exactly one of `budget` and `ratio` is set;
        `global_queries` is None for all.
        shares: How the layers share the budget; None where all have the same.
        level: Of the layers that these settings are for, where there are shares.
    """

    budget: int | None
    ratio: float | None
    recent_window: int
    recompress_interval: int
    min_blocks_saved: int
    global_queries: int | None = None
    allow_off: bool = True
    max_budget: int | None = None
    prefill_interval: int = 0
    shares: LayerShares | None = None
    level: int = 0

    def levels(self) -> "Iterator[tuple[int, PlanSettings]]":
        """Number of layers and settings of each level; without shares one level, counted as 1."""
        if self.shares is None:
            yield 1, self
            return
        for level, layers in enumerate(self.shares.levels):
            yield len(layers), replace(self, level=level)

    def for_layer(self, layer: int) -> "PlanSettings":
        """Settings of a layer; KeyError where it has no share."""
        if self.shares is None:
            return self
        return replace(self, level=self.shares.level_of(layer))

    def most_columns(self, block_size: int, max_model_len: int) -> int | None:
        """Columns that any request holds at most; None where one may hold its whole length.

        Args:
            block_size: Tokens per block.
            max_model_len: Longest request, in tokens.
        """
        if self.prefill_interval == 0 or self.allow_off:
            return None
        return _most_columns(self, block_size, max_model_len)

    def most_entries(self, block_size: int, max_model_len: int) -> int:
        """Entries per kv_head that any request holds at most in any layer, and most of a hit.

        Args: as of most_columns.
        """
        columns = [
            of_level.most_columns(block_size, max_model_len) for _, of_level in self.levels()
        ]
        known = [count * block_size for count in columns if count is not None]
        return min(max_model_len, max(known, default=max_model_len))

    def plan(self, prompt_len: int, block_size: int, request: SizeRequest) -> "CompressionPlan":
        """The plan of one request.

        Args:
            prompt_len: The request's num_prompt_tokens, also after preemption.
            block_size: Tokens per block of the KV-cache group.
            request: What the request asked for; the ceiling is the server's size, or `max_budget`
                where that is more.
        """
        # Imported here: reading settings must not need the compiled extension.
        from ems_vllm._C import CompressionPlan

        budgets = self._budget_blocks(prompt_len, block_size, request)
        return CompressionPlan(
            prompt_len=prompt_len,
            block_size=block_size,
            budget_blocks=budgets[self.level],
            recent_window=self.recent_window,
            recompress_interval=_round_up(self.recompress_interval, block_size),
            min_blocks_saved=self.min_blocks_saved,
            global_queries=self.global_queries,
            prefill_interval=_round_up(self.prefill_interval, block_size),
            prefill_budget_blocks=max(budgets),
        )

    def _budget_blocks(
        self, prompt_len: int, block_size: int, request: SizeRequest
    ) -> Sequence[int]:
        """Budget of each level in whole blocks; 0 keeps everything."""
        if not request.enabled and self.allow_off:
            return [0] * (self.level + 1)
        entries = _entries(self.budget, self.ratio, prompt_len)
        if request.budget is not None or request.ratio is not None:
            ceiling = max(entries, self.max_budget or 0)
            entries = min(ceiling, _entries(request.budget, request.ratio, prompt_len))
        blocks = max(1, -(-entries // block_size))
        if self.shares is None:
            return [blocks]
        before_window = prompt_blocks(prompt_len, self.recent_window, block_size)
        return self.shares.blocks(blocks, before_window)


@dataclass(frozen=True)
class _Largest:
    """A request that asks for as much as it may have."""

    budget: int | None
    enabled: bool = True
    ratio: float | None = None


@cache
def _most_columns(settings: PlanSettings, block_size: int, max_model_len: int) -> int:
    requests = [_Largest(None)]
    if settings.max_budget is not None:
        requests.append(_Largest(settings.max_budget))
    # The last token of a block; what a plan says of the others is at most a block more.
    ends = {*range(block_size, max_model_len, block_size), max_model_len}
    return 1 + max(
        settings.plan(end - 1, block_size, request).max_replay_columns(max_model_len)
        for request in requests
        for end in ends
    )


def prompt_blocks(prompt_len: int, recent_window: int, block_size: int) -> int:
    """Whole blocks of a prompt before its recent window: those that are compressed."""
    return max(0, prompt_len - recent_window) // block_size


def _entries(budget: int | None, ratio: float | None, prompt_len: int) -> int:
    if budget is not None:
        return budget
    assert ratio is not None
    return math.ceil(ratio * prompt_len)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
