# SPDX-License-Identifier: Apache-2.0
"""Which queries of a prompt score its entries, and what they pay them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ems_vllm.eval.transformers_engine.weights import attention_weights
from ems_vllm.ops.score_queries import is_sampled


class ScoredQueries(NamedTuple):
    """Which queries of a prompt are accumulated.

    Attributes:
        first: Position of the first.
        stride: From there on, one in so many, which counts for all.
    """

    first: int = 0
    stride: int = 1


def received_attention(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, stride: int = 1
) -> torch.Tensor:
    """Column sums of the causal attention matrix, averaged over the query heads of a kv_head.

    Paper: EMS, 2024, arXiv:2412.08521 (global score). The same definition as that of
    ops.score_queries, for entries that lie next to each other.

    Args:
        queries: [num_queries, num_heads, head_size] - of the last positions.
        keys: [num_kv_heads, num_entries, head_size].
        scale: Factor on the dot products.
        stride: Of the positions among the entries, one in so many counts for all.

    Returns:
        [num_kv_heads, num_entries], float32.
    """
    num_kv_heads, num_entries, _ = keys.shape
    positions = torch.arange(num_entries - len(queries), num_entries, device=keys.device)
    sampled = is_sampled(positions, stride)
    received = keys.new_zeros((num_kv_heads, num_entries), dtype=torch.float32)
    for weights in attention_weights(queries[sampled], keys, scale, positions[sampled]):
        received[:, : weights.shape[-1]] += weights.sum(dim=(1, 2))
    return received * (stride / (queries.shape[1] // num_kv_heads))
