# SPDX-License-Identifier: Apache-2.0
"""From how much entries matter to what each layer and kv_head needs at a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

# Of a fraction.
_DIGITS = 4


def head_fractions(
    peaks: Iterable[torch.Tensor], ratios: Sequence[float], num_sinks: int
) -> list[list[list[float]]]:
    """The fraction of a text that each kv_head keeps if the model keeps what matters most.

    All layers and kv_heads compete for one budget, so that a head's fraction is what it needs.

    Args:
        peaks: Of each text, [num_layers, num_kv_heads, num_tokens], comparable between layers.
        ratios: Budgets: fractions of all entries.
        num_sinks: First tokens, which every head keeps anyway and which do not count.

    Returns:
        By layer, kv_head and ratio: the mean over the texts.
    """
    of_texts = torch.stack([_fractions(of_text[..., num_sinks:], ratios) for of_text in peaks])
    return _rounded(of_texts.mean(0))


def layer_fractions(of_heads: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """By layer and ratio: what the heads of a layer keep on the mean."""
    return _rounded(torch.tensor(of_heads, dtype=torch.float64).mean(1))


def _fractions(peaks: torch.Tensor, ratios: Sequence[float]) -> torch.Tensor:
    """[num_layers, num_kv_heads, num_ratios], float64."""
    # How many entries of all matter more, ties to the lower index.
    ranks = torch.empty(peaks.numel(), dtype=torch.int64)
    order = peaks.flatten().argsort(descending=True, stable=True)
    ranks[order] = torch.arange(peaks.numel())
    ranks = ranks.view(peaks.shape)
    kept = [(ranks < round(ratio * peaks.numel())).double().mean(-1) for ratio in ratios]
    return torch.stack(kept, dim=-1)


def _rounded(fractions: torch.Tensor) -> Any:
    """Nested lists of numbers, of which a file need not say more."""
    rounded = (fractions * 10**_DIGITS).round().long().tolist()

    def scaled(part: Any) -> Any:
        return [scaled(one) for one in part] if isinstance(part, list) else part / 10**_DIGITS

    return scaled(rounded)
