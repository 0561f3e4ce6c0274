# SPDX-License-Identifier: Apache-2.0
"""From how much entries matter to what each layer needs at a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

# A file need not say more.
_DIGITS = 4


def layer_fractions(
    peaks: Iterable[torch.Tensor], ratios: Sequence[float], num_sinks: int
) -> list[list[float]]:
    """The fraction of a text that each layer keeps if the model keeps what matters most.

    All layers and kv_heads compete for one budget, so that a layer's fraction is what it needs.

    Args:
        peaks: Of each text, [num_layers, num_kv_heads, num_tokens], comparable between layers.
        ratios: Budgets: fractions of all entries.
        num_sinks: First tokens, which every head keeps anyway and which do not count.

    Returns:
        By layer, then by ratio: the mean over the texts.
    """
    of_texts = torch.stack([_fractions(of_text[..., num_sinks:], ratios) for of_text in peaks])
    mean = of_texts.mean(0)
    return [[round(float(fraction), _DIGITS) for fraction in layer] for layer in mean]


def _fractions(peaks: torch.Tensor, ratios: Sequence[float]) -> torch.Tensor:
    """[num_layers, num_ratios], float64."""
    # How many entries of all matter more, ties to the lower index.
    ranks = torch.empty(peaks.numel(), dtype=torch.int64)
    order = peaks.flatten().argsort(descending=True, stable=True)
    ranks[order] = torch.arange(peaks.numel())
    ranks = ranks.view(peaks.shape[0], -1)
    kept = [(ranks < round(ratio * peaks.numel())).double().mean(-1) for ratio in ratios]
    return torch.stack(kept, dim=-1)
