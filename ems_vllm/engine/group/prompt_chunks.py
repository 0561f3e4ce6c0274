# SPDX-License-Identifier: Apache-2.0
"""Prompt chunks of a step whose queries are accumulated into the global scores, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.engine.group.to_device import pad_rows, to_device

if TYPE_CHECKING:
    import torch

    from ems_vllm.engine.orders import ScoredChunk


@dataclass(frozen=True)
class PromptChunks:
    """Prompt chunks whose queries are accumulated; arguments of ops.score_queries by name.

    Attributes:
        tokens: Those of the batch from the first query that scores to the last; kernels get no
            others, since the number of tokens is all that they know before they run.
        block_table: [num_chunks, num_columns], int32 - live columns of each.
        query_starts: [num_chunks], int32 - the first query of each that scores, in `tokens`.
        query_lens: [num_chunks], int32 - its queries.
        seq_lens: [num_chunks], int32 - entries that its last query sees.
        accumulate_lens: [num_chunks], int32 - leading entries that have a score to add to; those
            of the others are overwritten.
        score_table: [num_chunks, num_columns], int32 - score pages of the columns.
    """

    tokens: slice
    block_table: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    seq_lens: torch.Tensor
    accumulate_lens: torch.Tensor
    score_table: torch.Tensor


def prompt_chunks(
    chunks: Sequence[ScoredChunk],
    query_starts: Sequence[int],
    block_size: int,
    device: torch.device,
) -> PromptChunks | None:
    """The prompt chunks of a batch that score.

    Args:
        chunks: Of one group.
        query_starts: Index in the batch of the first query of each that scores.
        block_size: Tokens per block.
        device: Of the result.

    Returns:
        None when there is no such chunk.
    """
    if not chunks:
        return None
    query_lens = [chunk.seq_len - chunk.first_query for chunk in chunks]
    first = min(query_starts)
    end = max(start + length for start, length in zip(query_starts, query_lens, strict=True))
    live_lens = [chunk.seq_len - chunk.first_column * block_size for chunk in chunks]
    return PromptChunks(
        tokens=slice(first, end),
        block_table=pad_rows([chunk.block_ids for chunk in chunks], device),
        query_starts=to_device([start - first for start in query_starts], device),
        query_lens=to_device(query_lens, device),
        seq_lens=to_device(live_lens, device),
        accumulate_lens=to_device([chunk.num_accumulated for chunk in chunks], device),
        score_table=pad_rows([score_pages(c.score_pages, c.block_ids) for c in chunks], device),
    )


def score_pages(private: Sequence[int], block_ids: Sequence[int]) -> list[int]:
    """Score page of every column: private ones first, then as the blocks."""
    return [*private, *block_ids[len(private) :]]
