# SPDX-License-Identifier: Apache-2.0
"""Whole chunks of entries, as in ChunkKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch.nn.functional import pad

from ems_vllm.policies.base import SELECTORS, Selector
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.base import Scores
    from ems_vllm.policies.context import CompactionContext


@SELECTORS.register("chunks")
class ChunksSelector(Selector):
    """Keeps chunks of consecutive entries by their mean score, the same ones in all kv_heads.

    Paper: Liu et al. 2025, ChunkKV, arXiv:2502.00299, around any score. A chunk for which the rest
    of the budget is too small is kept in part. Not served: reusing one layer's choice in others,
    which saves time only.
    """

    papers = (Paper("ChunkKV", "Liu et al.", 2025, "2502.00299"),)

    chunk_length: Annotated[int, Field(ge=1, le=1024)] = 10
    """Entries of a chunk: 10 in the paper, 20 in other public code."""

    @property
    def across_heads(self) -> bool:
        return True

    @property
    def num_rank_tensors(self) -> int:
        return 3

    def rank(self, context: CompactionContext, scores: Scores) -> Tensor:
        length = self.chunk_length
        num_entries = scores.weights.shape[-1]
        of_layer = context.mean_of_heads(scores.weights.clone())
        padding = -num_entries % length
        chunks = pad(of_layer, (0, padding)).unflatten(-1, (-1, length))
        counts = pad(context.is_entry.float(), (0, padding)).unflatten(-1, (-1, length))
        means = chunks.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_(min=1)
        ranked = means.expand_as(chunks).flatten(-2)[..., :num_entries]
        return ranked.masked_fill(~context.is_entry, 0.0)
