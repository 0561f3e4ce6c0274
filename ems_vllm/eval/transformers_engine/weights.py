# SPDX-License-Identifier: Apache-2.0
"""The causal attention matrix of some queries, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Attention logits that are in memory at a time.
_MAX_LOGITS = 1 << 20


def attention_weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Rows of the matrix, in order.

    Args:
        queries: [num_queries, num_heads, head_size].
        keys: [num_kv_heads, num_entries, head_size].
        scale: Factor on the dot products.
        positions: [num_queries], int64 - of the queries among the entries, ascending; the last
            ones where None.

    Yields:
        [num_kv_heads, group, num_rows, num_visible], float32: what each query head of a kv_head
        pays to the entries that the last of these rows sees; 0 where a row does not.
    """
    num_kv_heads, num_entries, _ = keys.shape
    num_queries, num_heads, _ = queries.shape
    if positions is None:
        positions = torch.arange(num_entries - num_queries, num_entries, device=keys.device)
    grouped = (scale * queries.float()).transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    keys = keys.float().transpose(1, 2)
    num_rows = max(1, _MAX_LOGITS // (num_heads * num_entries))
    for start in range(0, num_queries, num_rows):
        rows = grouped[:, :, start : start + num_rows]
        at = positions[start : start + num_rows]
        num_visible = int(at[-1]) + 1
        logits = rows @ keys[:, None, :, :num_visible]
        is_future = torch.arange(num_visible, device=keys.device) > at[:, None]
        logits.masked_fill_(is_future, float("-inf"))
        yield logits.softmax(dim=-1)
