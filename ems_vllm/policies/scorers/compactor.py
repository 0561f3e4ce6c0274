# SPDX-License-Identifier: Apache-2.0
"""Leverage of keys and attention, as in Compactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from ems_vllm.policies.alignment import deviation
from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.key_scores import SCRATCH_BYTES, key_scores
from ems_vllm.policies.paper import Paper
from ems_vllm.policies.pooling import odd, pool

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("compactor")
class CompactorScorer(Scorer):
    """Leverage of keys before RoPE and smoothed attention * |v|, each in its standard deviations.

    Paper: Chari & Van Durme 2025, Compactor, arXiv:2507.08143. Deviations: leverage is exact
    instead of sketched, and has a ridge; attention is causal and of all accumulated queries
    (`global_queries`), where the paper's is that of chunks of 256 tokens which see each other in
    both directions; deviations are those of a kv_head, not of a layer. Entries that were compressed
    before have no leverage, because their positions are not known.
    """

    papers = (Paper("Compactor", "Chari & Van Durme", 2025, "2507.08143"),)

    blending: Annotated[float, Field(ge=0, le=100)] = 0.35
    """Weight of leverage, beside 1 of attention; public code takes the part that is dropped, or
    0.35."""

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 3
    """Width of the mean of attention over neighbours, odd; 1 switches it off."""

    _odd = field_validator("kernel_size")(odd)

    @property
    def uses_accumulated(self) -> bool:
        return True

    @property
    def uses_window(self) -> bool:
        return True

    @property
    def scratch_bytes(self) -> int:
        return SCRATCH_BYTES

    def score(self, context: CompactionContext) -> Scores:
        carry = context.accumulated_scores(context.window_scores())
        attention = pool(carry * context.value_norms(), context.is_entry, self.kernel_size, "avg")
        # Means need no subtraction: they are the same for all entries of a head.
        attention.div_(deviation(attention, context.is_eligible))
        leverage = key_scores(context).leverage
        assert leverage is not None
        leverage.masked_fill_(~context.is_untouched[:, None, None], 0.0)
        attention.addcmul_(leverage, self.blending / deviation(leverage, context.is_eligible))
        return Scores(attention.masked_fill_(~context.is_entry, 0.0), carry, carry)
