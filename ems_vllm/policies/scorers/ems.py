# SPDX-License-Identifier: Apache-2.0
"""Global-local score of EMS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from ems_vllm.policies.alignment import Order, by_quantile, deviation
from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.key_scores import key_scores
from ems_vllm.policies.paper import EMS, Paper
from ems_vllm.policies.pooling import Pooling, odd, pool

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# Below any attention of a head that counts, summed over entries.
_EPS = 1e-30

_Share = Annotated[float, Field(ge=0, le=1)]
_Width = Annotated[int, Field(ge=1, le=63)]


@SCORERS.register("ems")
class EMSScorer(Scorer):
    """Accumulated and recent attention, and what the keys say, aligned and combined per kv_head.

    Paper: Li et al. 2024, arXiv:2412.08521. The structure (a global and a local accumulated
    attention score, aligned, combined by a maximum, for every head) is the paper's. Its exact form
    was not available to us; `alignment: mean` is our reading of it:

        score = pooled(max(global * mean(local) / mean(global), local))

    `alignment: quantile` (ours) aligns ranks instead of means (alignment.by_quantile), so that each
    order fills its share of the budget:

        local     pooled(peak of recent attention * |v|)     what the end of the prompt asks for
        global    accumulated attention * |v|                what running text needs
        keys      mean of neighbours(leverage + distinctness * |v|)    what stands out, and may be
                                                             asked for whatever comes later

    The peak is the most that one recorded query of one head pays (ours): a question asks for an
    entry once, and the sum over the window prefers what every query looks at.

    The value's norm says how much an entry can change an output (Guo et al. 2024, VATP,
    arXiv:2406.12335). Leverage of keys before RoPE is Compactor's (Chari & Van Durme 2025,
    arXiv:2507.08143), distinctness, 1 - cos(k, mean k), KeyDiff's (Park et al. 2025,
    arXiv:2504.15364). Adding them up, each in its standard deviations, and averaging over
    neighbours, because what belongs together is of use together, is ours.

    Query heads of a kv_head are averaged (ours). At a recompression while decoding, the carried
    global score of an entry grows by the attention of the recorded queries, which count for all
    tokens generated since the last compression (ours, `CompactionContext.accumulated_scores`).
    Pooling is SnapKV's idea; that it looks back only is ours: a model that copies attends to where
    the copy begins, and reads on from there when the prompt has long been compressed.
    """

    papers = (
        EMS,
        Paper("VATP", "Guo et al.", 2024, "2406.12335"),
        Paper("Compactor", "Chari & Van Durme", 2025, "2507.08143"),
        Paper("KeyDiff", "Park et al.", 2025, "2504.15364"),
    )

    alignment: Literal["quantile", "mean"] = "quantile"
    """How the orders get one measure: by their ranks (ours), or by their means."""

    local_share: _Share = 0.1
    """Part of the budget that recent attention fills; quantile alignment only."""

    key_share: _Share = 0.7
    """Part that keys fill; accumulated attention has the rest; quantile alignment only."""

    local_first: Annotated[int, Field(ge=0, le=4096)] = 26
    """Entries that recent attention fills before the others have their share: a tight budget keeps
    what the question asks for. Two spans of the pooling; quantile alignment only."""

    local_by: Literal["peak", "sum"] = "peak"
    """What counts as recent attention: the most that an entry receives from one recorded query of
    one head, or the sum over queries and mean over heads; quantile alignment only."""

    kernel_size: _Width = 13
    """Width of the pooling of recent attention over neighbours, odd; 1 switches it off."""

    key_kernel_size: _Width = 5
    """Width of the mean over neighbours of what keys say, odd; quantile alignment only."""

    leverage_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Weight of leverage, beside 1 of distinctness; quantile alignment only."""

    pooling: Pooling = "forward"
    """How: avg, max, or forward, the maximum over an entry and those before it (ours)."""

    _odd = field_validator("kernel_size", "key_kernel_size")(odd)

    @model_validator(mode="after")
    def _shares_are_parts_of_one(self) -> EMSScorer:
        if self.local_share + self.key_share > 1:
            raise ValueError(
                f"local_share {self.local_share} and key_share {self.key_share} make more than the "
                "whole budget; lower one of them"
            )
        return self

    @property
    def uses_accumulated(self) -> bool:
        return True

    @property
    def uses_window(self) -> bool:
        return True

    @property
    def scratch_bytes(self) -> int:
        return SLICE_BYTES if self.alignment == "quantile" else 0

    def score(self, context: CompactionContext) -> Scores:
        is_by_peak = self.alignment == "quantile" and self.local_by == "peak"
        peaks = context.new_scores() if is_by_peak else None
        window = context.window_scores(peaks)
        carry = context.accumulated_scores(window)
        mass = torch.maximum(carry * _mean_ratio(window, carry), window)
        if self.alignment == "mean":
            weights = pool(mass, context.is_entry, self.kernel_size, self.pooling)
        else:
            recent = window if peaks is None else peaks
            del window, peaks
            orders = self._orders(context, recent, carry)
            weights = by_quantile(orders, context)
        return Scores(weights, carry, mass)

    def _orders(self, context: CompactionContext, recent: Tensor, carry: Tensor) -> Iterator[Order]:
        """One at a time, because each is as large as all scores; `recent` is overwritten."""
        # Without the rest that is left of two numbers like 0.7 and 0.3.
        global_share = round(1 - self.local_share - self.key_share, 9)
        norms = context.value_norms()
        if self.local_share:
            local = pool(recent.mul_(norms), context.is_entry, self.kernel_size, self.pooling)
            yield Order(local, self.local_share, self.local_first)
            del local
        if global_share:
            yield Order(carry * norms, global_share)
        if self.key_share:
            keys = self._keys(context, norms)
            keys = pool(keys, context.is_entry, self.key_kernel_size, "avg")
            yield Order(keys, self.key_share)

    def _keys(self, context: CompactionContext, norms: Tensor) -> Tensor:
        """What keys say of entries; `norms` are overwritten."""
        scores = key_scores(context, with_leverage=self.leverage_weight > 0)
        keys, leverage = norms.mul_(scores.distinctness), scores.leverage
        del scores
        if leverage is not None:
            keys.div_(deviation(keys, context.is_eligible))
            # Positions that are not known leave RoPE in the keys, which then says more than they.
            leverage.masked_fill_(~context.is_untouched[:, None, None], 0.0)
            weight = self.leverage_weight / deviation(leverage, context.is_eligible)
            keys.addcmul_(leverage, weight)
        return keys


def _mean_ratio(window: Tensor, carry: Tensor) -> Tensor:
    """mean(window) / mean(carry) over the entries of a head; finite where nothing was accumulated.

    Both are 0 beyond a row's entries, so the ratio of sums is the ratio of means.
    """
    total = carry.sum(-1, keepdim=True).clamp_(min=_EPS)
    return window.sum(-1, keepdim=True).div_(total)
