# SPDX-License-Identifier: Apache-2.0
"""How the layers of a model share a budget."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerShares:
    """What each level of layers keeps of a prompt, for every budget there may be (ours).

    Layers are dealt to in levels and not one by one, because all layers of a level share a block
    table. A share depends on the budget: what is 5 times the mean at 2 % of a prompt would be more
    than the prompt at 50 %. Between the ratios that are given, fractions are interpolated, so that
    their mean over the layers is the budget wherever it is at these ratios; 0 keeps nothing and 1
    everything.

    Attributes:
        levels: Indices of the layers of each level, among all layers of the model.
        ratios: Ascending, in (0, 1): fractions of a prompt that layers keep on the mean.
        fractions: By level and ratio: the fraction that each layer of the level keeps then, in
            [0, 1], never falling with the ratio.
    """

    levels: tuple[tuple[int, ...], ...]
    ratios: tuple[float, ...]
    fractions: tuple[tuple[float, ...], ...]

    @cached_property
    def num_layers(self) -> int:
        """Of all levels."""
        return sum(map(len, self.levels))

    def level_of(self, layer: int) -> int:
        """Level of a layer; KeyError where it is in none."""
        return self._level_of[layer]

    @cached_property
    def _level_of(self) -> dict[int, int]:
        return {layer: level for level, layers in enumerate(self.levels) for layer in layers}

    def blocks(self, mean_blocks: int, prompt_blocks: int) -> tuple[int, ...]:
        """Blocks that a layer of each level keeps; at least one, and never more than there are.

        Together they are as many as with `mean_blocks` in every layer, or fewer by less than one
        block in each layer of a level.

        Args:
            mean_blocks: Budget of a layer on the mean, at least 1.
            prompt_blocks: Blocks of the prompt that are compressed into them.
        """
        if mean_blocks >= prompt_blocks:
            return (mean_blocks,) * len(self.levels)
        ratio = mean_blocks / prompt_blocks
        wanted = [self._fraction(level, ratio) * prompt_blocks for level in range(len(self.levels))]
        dealt = [min(prompt_blocks, max(1, int(blocks))) for blocks in wanted]
        left = mean_blocks * self.num_layers - sum(
            blocks * len(layers) for blocks, layers in zip(dealt, self.levels, strict=True)
        )
        # Ties go to the lower level; nothing else is left to chance.
        while left < 0:
            level = max(
                (level for level, blocks in enumerate(dealt) if blocks > 1),
                key=lambda level: dealt[level] - wanted[level],
            )
            dealt[level] -= 1
            left += len(self.levels[level])
        while True:
            open_levels = [
                level
                for level, layers in enumerate(self.levels)
                if dealt[level] < prompt_blocks and len(layers) <= left
            ]
            if not open_levels:
                return tuple(dealt)
            level = max(open_levels, key=lambda level: wanted[level] - dealt[level])
            dealt[level] += 1
            left -= len(self.levels[level])

    def _fraction(self, level: int, ratio: float) -> float:
        """What a level keeps at a ratio in (0, 1)."""
        ratios, fractions = self.ratios, self.fractions[level]
        after = bisect_right(ratios, ratio)
        low, start = (ratios[after - 1], fractions[after - 1]) if after else (0.0, 0.0)
        high, end = (ratios[after], fractions[after]) if after < len(ratios) else (1.0, 1.0)
        return start + (end - start) * (ratio - low) / (high - low)
