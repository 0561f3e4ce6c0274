# SPDX-License-Identifier: Apache-2.0
"""How much an entry stands out from what comes right after it, as in LagKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.reading import Part, parts

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# Copies of keys or values while they are compared with those that come next.
_COPIES = 5


@SCORERS.register("lagkv")
class LagKVScorer(Scorer):
    """Rank of an entry among its neighbours, by how it spreads over the range of the next ones.

    Paper: Liang et al. 2025, LagKV, arXiv:2504.04704. Behind the sinks, entries are divided into
    partitions of `lag`. Each dimension of a key is put on the scale from the least to the largest
    of the next partition; a softmax over the partition of their standard deviation over dimensions,
    averaged with the same of values, ranks the entries of a partition. What no whole partition
    follows ranks above all. Needs no queries, so a hit in the prefix cache changes nothing.
    """

    papers = (Paper("LagKV", "Liang et al.", 2025, "2504.04704"),)

    lag: Annotated[int, Field(ge=2, le=2048)] = 128
    """Entries of a partition."""

    @property
    def scratch_bytes(self) -> int:
        return SLICE_BYTES

    def score(self, context: CompactionContext) -> Scores:
        weights = context.new_scores()
        # Of one kv_head at a time, so that long partitions fit; beside the entries that are ranked,
        # what their last partition lacks, and the next one.
        num_floats = _COPIES * context.key_cache.shape[-1]
        beside = 2 * self.lag * num_floats
        for part in parts(context, num_floats, floats_per_row=beside, multiple=self.lag):
            for head in range(context.num_kv_heads):
                weights[part.place][:, :, head] = self._of_head(part, head)
        return Scores(weights.masked_fill_(~context.is_entry, 0.0))

    def _of_head(self, part: Part, head: int) -> Tensor:
        """[layers, rows, max_entries]: scores of one kv_head of some layers and rows."""
        context, lag = part.context, self.lag
        caches = [cache[:, :, head, None] for cache in (context.key_cache, context.value_cache)]
        sinks = context.num_protected[part.rows]
        behind = (context.num_entries[part.rows] - sinks)[:, None]
        num_compared = (behind // lag - 1).clamp(min=0) * lag
        ranks = []
        for at in part.entries():
            # With the partition that comes next.
            wider = slice(at.start, at.start + -(-(at.stop - at.start) // lag) * lag + lag)
            spread = sum(
                _spread(part.vectors(cache, wider, context.num_protected).unflatten(3, (-1, lag)))
                for cache in caches
            )
            assert isinstance(spread, torch.Tensor)
            order = spread.argsort(-1).argsort(-1).squeeze(2)
            ranks.append(order.flatten(2).float().div_(lag))
        place = torch.arange(context.max_entries, device=context.device)
        found = torch.cat(ranks, -1)[..., : context.max_entries]
        # The later, the higher, above any rank: too short a row keeps its end.
        recent = 1 + place / context.num_entries[part.rows, None].clamp(min=1)
        is_compared = place < num_compared
        found = torch.where(is_compared, found, recent)
        # From places behind the sinks to entries.
        index = (place - sinks[:, None]).clamp_(min=0).expand_as(found)
        return found.gather(-1, index.long())


def _spread(partitions: Tensor) -> Tensor:
    """Softmax over each partition but the last of how entries spread over the next one's range.

    Args:
        partitions: [layers, rows, 1, partitions, lag, head_size].

    Returns:
        [layers, rows, 1, partitions - 1, lag].
    """
    following = partitions[..., 1:, :, :]
    low, high = following.amin(-2, keepdim=True), following.amax(-2, keepdim=True)
    scaled = (partitions[..., :-1, :, :] - low).div_(high - low)
    return scaled.std(-1).nan_to_num_(posinf=0.0).softmax(-1)
