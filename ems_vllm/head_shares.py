# SPDX-License-Identifier: Apache-2.0
"""How the kv_heads of a layer share the pages of its compressed columns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class HeadShares:
    """What each kv_head of a layer keeps of a prompt, for every budget there may be (ours).

    A page is the slots of one kv_head in one block: a budget of B blocks is B pages for each of H
    kv_heads, and B * H in all, however they are dealt. Heads keep what they would if the budget of
    the whole model were such that their layer keeps B blocks; between the ratios that are given,
    fractions are interpolated.

    Attributes:
        ratios: Ascending, in (0, 1): fractions of a prompt that the model keeps on the mean.
        fractions: By kv_head and ratio: the fraction that the head keeps then, in [0, 1], never
            falling with the ratio.
    """

    ratios: tuple[float, ...]
    fractions: tuple[tuple[float, ...], ...]

    @property
    def num_heads(self) -> int:
        return len(self.fractions)

    def of_heads(self, start: int, stop: int) -> HeadShares:
        """Shares among some heads only, as on a rank of tensor parallelism."""
        return HeadShares(self.ratios, self.fractions[start:stop])

    def pages(self, budget_blocks: int, prompt_blocks: int, least: int = 1) -> tuple[int, ...]:
        """Pages of each head: at least `least`, never more than there are, as many as equal shares.

        Args:
            budget_blocks: Of the layer, at least 1.
            prompt_blocks: Blocks of the prompt that are compressed into them.
            least: Pages that any head needs, 1 to budget_blocks.
        """
        if budget_blocks >= prompt_blocks:
            return (budget_blocks,) * self.num_heads
        wanted = [
            fraction * prompt_blocks for fraction in self._fractions(budget_blocks / prompt_blocks)
        ]
        most = [prompt_blocks] * self.num_heads
        return tuple(whole_pages(wanted, budget_blocks * self.num_heads, least, most))

    def _fractions(self, of_layer: float) -> list[float]:
        """What each head keeps where their mean is `of_layer`, in (0, 1)."""
        after = bisect_left(self._means, of_layer)
        low, high = self._means[after - 1], self._means[after]
        part = (of_layer - low) / (high - low)
        return [start + (end - start) * part for start, end in self._columns[after - 1]]

    @cached_property
    def _means(self) -> list[float]:
        """By ratio, from 0 to 1: what the heads keep on the mean."""
        inner = [sum(at_ratio) / self.num_heads for at_ratio in zip(*self.fractions, strict=True)]
        return [0.0, *inner, 1.0]

    @cached_property
    def _columns(self) -> list[list[tuple[float, float]]]:
        """By stretch between two ratios: where each head starts and ends."""
        points = [(0.0, *of_head, 1.0) for of_head in self.fractions]
        return [
            [(of_head[at], of_head[at + 1]) for of_head in points]
            for at in range(len(self.ratios) + 1)
        ]


def whole_pages(
    wanted: Sequence[float], num_pages: int, least: int, most: Sequence[int]
) -> list[int]:
    """Deal pages to heads, each as close as can be to what it wants (largest remainder).

    Args:
        wanted: Pages of each head, > 0.
        num_pages: Of all heads together, between the sums of `least` and `most`.
        least: Of any head.
        most: Of each head.
    """
    bounds = list(enumerate(most))
    dealt = [min(most[head], max(least, int(pages))) for head, pages in enumerate(wanted)]
    left = num_pages - sum(dealt)
    # Ties go to the lower head; nothing else is left to chance.
    while left < 0:
        heads = (head for head, pages in enumerate(dealt) if pages > least)
        dealt[max(heads, key=lambda head: dealt[head] - wanted[head])] -= 1
        left += 1
    while left > 0:
        heads = (head for head, bound in bounds if dealt[head] < bound)
        dealt[max(heads, key=lambda head: wanted[head] - dealt[head])] += 1
        left -= 1
    return dealt


def least_and_most(
    layers: Iterable[HeadShares], budget_blocks: int, prompt_blocks: int
) -> tuple[int, int]:
    """Fewest and most pages of a head of any of some layers; see HeadShares.pages."""
    dealt = [pages for one in layers for pages in one.pages(budget_blocks, prompt_blocks)]
    return min(dealt), max(dealt)
