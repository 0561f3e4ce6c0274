# SPDX-License-Identifier: Apache-2.0
"""Scores that carry over to neighbouring entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import maximum
from torch.nn.functional import avg_pool1d, max_pool1d

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["avg", "max", "forward"]


def odd(value: int) -> int:
    """Checks the width of a kernel that has a centre.

    Raises:
        ValueError: it is even.
    """
    if value % 2 == 0:
        raise ValueError(f"the kernel has a centre; use {value - 1} or {value + 1}")
    return value


def pool(scores: Tensor, is_entry: Tensor, kernel_size: int, pooling: Pooling) -> Tensor:
    """Scores pooled over the entries under a kernel.

    "avg" and "max" take the mean or the maximum of an entry and its neighbours on both sides,
    "forward" (ours) the maximum of an entry and those before it: an attended entry keeps what
    follows it, which is what a model that copies reads next.

    A row's result does not depend on how much longer another row of the batch is.

    Args:
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32, >= 0, 0 beyond the
            entries of a row.
        is_entry: [1, num_rows, 1, max_entries], bool.
        kernel_size: Width of the kernel, odd; 1 leaves the scores as they are.
    Returns:
        Like scores.
    """
    if kernel_size == 1:
        return scores
    if pooling == "max":
        pooled = _pooled(scores, max_pool1d, kernel_size)
    elif pooling == "forward":
        pooled = _maximum_so_far(scores, kernel_size)
    else:
        share = _pooled(is_entry[:, :, 0].float(), avg_pool1d, kernel_size)[:, :, None]
        pooled = _pooled(scores, avg_pool1d, kernel_size).div_(share)
    return pooled.masked_fill_(~is_entry, 0.0)


def _pooled(values: Tensor, operation: Callable[..., Tensor], kernel_size: int) -> Tensor:
    """Over the last dimension; nothing beyond its ends."""
    flat = values.flatten(0, -2).unsqueeze(1)
    return operation(flat, kernel_size, stride=1, padding=kernel_size // 2).view_as(values)


def _maximum_so_far(values: Tensor, width: int) -> Tensor:
    """Of each value and the width - 1 before it, in the last dimension.

    Doubles what a value has seen. A pooling would need a padded copy, and indices on a GPU.
    """
    seen = 1
    while seen < width:
        step = min(seen, width - seen)
        further = values.clone()
        maximum(values[..., step:], values[..., :-step], out=further[..., step:])
        values = further
        seen += step
    return values
