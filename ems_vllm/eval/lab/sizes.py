# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt a variant may hold: entries, or bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.transformers_engine.quantised import FORMATS, PLAIN, CacheFormat

if TYPE_CHECKING:
    from ems_vllm.config.cache_shape import CacheShape

EVERYTHING = Budget()


@dataclass(frozen=True)
class ByteBudget:
    """A share of the bytes that a prompt takes in the model's dtype.

    Attributes:
        ratio: 4 is a quarter of them.
    """

    ratio: float

    def total(self, num_tokens: int, shape: CacheShape, cache_format: CacheFormat) -> int:
        """Entries per kv_head that take at most that much.

        Args:
            num_tokens: Of the prompt, which is all that there is to hold.
            shape: Of the cache.
            cache_format: How entries are stored.
        """
        plain = FORMATS[PLAIN].entry_bytes(shape)
        share = plain / (self.ratio * cache_format.entry_bytes(shape))
        return math.floor(min(1.0, share) * num_tokens + 1e-9)

    def __str__(self) -> str:
        return f"{self.ratio:g}x"


Size = Budget | ByteBudget


def parse_sizes(texts: Iterable[str]) -> list[Size]:
    """Sizes as they were typed, with spaces or commas between them.

    Args:
        texts: Entries per kv_head in all (256), fractions of the length (0.06), or how many times
            fewer bytes than the full cache's (4x).

    Raises:
        ConfigError: one is something else.
    """
    sizes = [_parse(part) for text in texts for part in text.split(",")]
    return list(dict.fromkeys(sizes))


def _parse(text: str) -> Size:
    if text.endswith("x"):
        try:
            ratio = float(text.removesuffix("x"))
        except ValueError:
            ratio = math.nan
        if not 1 <= ratio < math.inf:
            raise ConfigError(
                f"budgets={shown(text)} is no ratio of bytes: give one of at least 1, like 4x."
            )
        return ByteBudget(ratio)
    size = Budget.parse(text)
    if size == EVERYTHING:
        raise ConfigError(
            "budgets='full' is not allowed: the full cache is always measured; give entries, "
            "fractions of the length, or ratios of bytes (4x)."
        )
    return size
