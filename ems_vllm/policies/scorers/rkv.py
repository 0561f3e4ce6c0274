# SPDX-License-Identifier: Apache-2.0
"""Attention, less what is said again, as in R-KV."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, field_validator
from torch.nn.functional import normalize

from ems_vllm.policies.base import SCORERS, Scores
from ems_vllm.policies.context import SLICE_BYTES, slices
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.pooling import odd, pool
from ems_vllm.policies.reading import Part, softmax_over
from ems_vllm.policies.window_attention import WindowAttention, WindowScorer, window_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# Floats of a pair of entries while similar ones are sought, and of an entry, per head dimension.
_PER_PAIR, _PER_ENTRY = 6, 4


@SCORERS.register("rkv")
class RKVScorer(WindowScorer):
    """What recorded queries look at, less how much keys repeat each other.

    Paper: Cai et al. 2025, R-KV, arXiv:2505.24133, for long reasoning:

        score = lambda * attention - (1 - lambda) * redundancy

    attention: softmax over the entries of the largest logit of the group, mean over queries, and
    the maximum over neighbours. redundancy: softmax over entries of the mean cosine with the other
    keys, of which, for each key, the last one that is more similar than `similar` does not count:
    so the newest of several repetitions stays. As weights are >= 0, the largest redundancy of a
    kv_head is added.

    Ours: keys are compared within runs of `span` entries, so that the cost of a long prompt does
    not grow with its square; a budget of less is compared as in the paper.
    """

    papers = (Paper("R-KV", "Cai et al.", 2025, "2505.24133"),)

    attention_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    """lambda: 0.1 in the paper, 0.07 in its code."""

    similar: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Cosine above which two keys say the same."""

    span: Annotated[int, Field(ge=16, le=65536)] = 4096
    """Entries that are compared with each other."""

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 7
    """Width of the maximum over neighbouring entries, odd; 1 switches it off."""

    _odd = field_validator("kernel_size")(odd)

    def score(self, context: CompactionContext) -> Scores:
        attention = pool(_attention(context), context.is_entry, self.kernel_size, "max")
        repeated = _redundancy(context, self.similar, self.span)
        repeated = repeated.masked_fill_(~context.is_entry, -torch.inf).softmax(-1)
        distinct = repeated.amax(-1, keepdim=True) - repeated
        weights = distinct.mul_(1 - self.attention_weight)
        weights.add_(attention, alpha=self.attention_weight)
        return Scores(weights.masked_fill_(~context.is_entry, 0.0))


def _attention(context: CompactionContext) -> Tensor:
    """Mean over recorded queries of softmax over entries of the group's largest logits."""
    found = context.new_scores()
    for window in window_attention(context):
        part = window.part
        is_entry = context.is_entry[0, part.rows, 0][None, :, None, None]
        unrecorded = ~window.is_recorded[:, None, :, None]

        def logits(
            at: slice,
            window: WindowAttention = window,
            is_entry: Tensor = is_entry,
        ) -> Tensor:
            of_group = window.logits(at).amax(3)
            return of_group.masked_fill_(~is_entry[..., at], -torch.inf)

        for at, attention in softmax_over(part.entries(), logits):
            attention.masked_fill_(unrecorded, 0.0)
            count = window.count[:, None, None]
            found[part.place][..., at] = attention.sum(-2) / count
    return found.masked_fill_(~context.is_entry, 0.0)


def _redundancy(context: CompactionContext, similar: float, span: int) -> Tensor:
    """Mean over keys of their cosines with this one, but for each key's last similar one.

    Args:
        similar: Cosine of those that are.
        span: Keys that are compared with each other.
    """
    sums = context.new_scores().zero_()
    num_heads, head_size = context.num_kv_heads, context.key_cache.shape[-1]
    # Pairs of at most so many entries with as many.
    fitting = SLICE_BYTES // (4 * num_heads)
    per_entry = _PER_ENTRY * head_size
    side = (math.isqrt(per_entry**2 + 4 * _PER_PAIR * fitting) - per_entry) // (2 * _PER_PAIR)
    span = min(span, context.max_entries)
    side = max(1, min(side, span))
    at_once = max(1, fitting // (side * (per_entry + _PER_PAIR * side)))
    layers = range(context.num_layers)
    for of_layers, of_rows in slices(layers, context.num_rows, at_once):
        part = Part(context, of_layers, of_rows, side)
        for start in range(0, context.max_entries, span):
            run = slice(start, min(start + span, context.max_entries))
            for at in part.steps(run):
                _add_similarities(part, at, run, similar, sums[part.place])
    return sums.div_(context.num_entries.clamp(max=span)[:, None, None])


def _add_similarities(part: Part, at: slice, run: slice, similar: float, sums: Tensor) -> None:
    """Add the cosines of some keys of a run with all others of it to the sums of the others."""
    context = part.context
    keys = _directions(part, at)
    entry = torch.arange(at.start, at.stop, device=context.device)[:, None]
    best = keys.new_zeros(keys.shape[:-1])
    last = torch.full_like(best, -1, dtype=torch.int64)
    for others in part.steps(run):
        other = torch.arange(others.start, others.stop, device=context.device)
        cosines = keys @ _directions(part, others).transpose(-1, -2)
        cosines.masked_fill_(entry == other, 0.0)
        sums[..., others] += cosines.sum(-2)
        place = torch.where(cosines > similar, other, -1).amax(-1)
        at_place = cosines.gather(-1, (place - others.start).clamp(min=0)[..., None]).squeeze(-1)
        best = torch.where(place >= 0, at_place, best)
        last = torch.where(place >= 0, place, last)
    sums.scatter_add_(-1, last.clamp(min=0), -best)


def _directions(part: Part, at: slice) -> Tensor:
    """Unit keys; 0 where there is no entry."""
    keys = normalize(part.keys(at), dim=-1)
    is_entry = part.context.is_entry[0, part.rows, 0, at]
    return keys.masked_fill_(~is_entry[:, None, :, None], 0.0)
