# SPDX-License-Identifier: Apache-2.0
"""From how much entries or heads matter to what each layer and kv_head needs at a budget."""

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
    return rounded(of_texts.mean(0))


def layer_fractions(of_heads: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """By layer and ratio: what the heads of a layer keep on the mean."""
    return rounded(torch.tensor(of_heads, dtype=torch.float64).mean(1))


def in_proportion(
    importance: torch.Tensor, ratios: Sequence[float], most: float = torch.inf
) -> list[list[list[float]]]:
    """The fraction that each kv_head keeps if a budget is dealt in proportion to importance.

    Whoever has everything leaves the rest to the others, those without any importance coming last.

    Args:
        importance: [num_layers, num_kv_heads], >= 0.
        ratios: Fractions that heads keep on the mean.
        most: Of a head, as a multiple of the mean.

    Returns:
        By layer, kv_head and ratio.
    """
    flat = importance.double().flatten()
    dealt = [_dealt(flat, ratio * len(flat), min(1.0, most * ratio)) for ratio in ratios]
    return rounded(torch.stack(dealt, dim=-1).view(*importance.shape, len(ratios)))


def by_mass(mass: torch.Tensor, ratios: Sequence[float]) -> torch.Tensor:
    """The fraction that each layer keeps if all keep the same share of their attention.

    Paper: Wang et al. 2024, PrefixKV, arXiv:2412.03409: one share for all layers, found by
    bisection so that they keep the budget on the mean.

    Args:
        mass: [num_layers, num_tokens], >= 0 - attention that tokens received.
        ratios: Fractions that layers keep on the mean.

    Returns:
        [num_layers, num_ratios], float64.
    """
    num_tokens = mass.shape[-1]
    held = mass.double().sort(dim=-1, descending=True).values.cumsum(-1)
    held /= held[:, -1:]
    found = []
    for ratio in ratios:
        low, high = 0.0, 1.0
        for _ in range(50):
            share = (low + high) / 2
            if (held < share).double().mean() < ratio:
                low = share
            else:
                high = share
        kept = (held < high).double().mean(-1)
        # Of the last steps, where many layers take one token more at once.
        found.append(kept * ratio / kept.mean().clamp(min=1 / num_tokens))
    return torch.stack(found, dim=-1).clamp(max=1.0)


def rounded(fractions: torch.Tensor) -> Any:
    """Nested lists of numbers, of which a file need not say more."""
    rounded = (fractions * 10**_DIGITS).round().long().tolist()

    def scaled(part: Any) -> Any:
        return [scaled(one) for one in part] if isinstance(part, list) else part / 10**_DIGITS

    return scaled(rounded)


def _dealt(weights: torch.Tensor, total: float, most: float) -> torch.Tensor:
    """min(most, factor * weights) whose sum is `total`; what is left is for those that weigh 0."""
    dealt = torch.zeros_like(weights)
    is_open = weights > 0
    while is_open.any():
        left = total - float(dealt[~is_open].sum())
        wanted = left * weights / weights[is_open].sum()
        is_full = is_open & (wanted >= most)
        if not is_full.any():
            return torch.where(is_open, wanted, dealt)
        dealt[is_full] = most
        is_open &= ~is_full
    is_weightless = weights <= 0
    if is_weightless.any():
        left = total - float(dealt.sum())
        dealt[is_weightless] = min(1.0, max(0.0, left / int(is_weightless.sum())))
    return dealt


def _fractions(peaks: torch.Tensor, ratios: Sequence[float]) -> torch.Tensor:
    """[num_layers, num_kv_heads, num_ratios], float64."""
    # How many entries of all matter more, ties to the lower index.
    ranks = torch.empty(peaks.numel(), dtype=torch.int64)
    order = peaks.flatten().argsort(descending=True, stable=True)
    ranks[order] = torch.arange(peaks.numel())
    ranks = ranks.view(peaks.shape)
    kept = [(ranks < round(ratio * peaks.numel())).double().mean(-1) for ratio in ratios]
    return torch.stack(kept, dim=-1)
