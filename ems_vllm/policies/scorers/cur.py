# SPDX-License-Identifier: Apache-2.0
"""Approximate leverage of keys and values, as in CurDKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch.nn.functional import pad

from ems_vllm.policies.base import SCORERS, Scorer, Scores
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

# Where all vectors of a run are 0, any number that can be divided by.
_EPS = 1e-30


@SCORERS.register("cur")
class CURScorer(Scorer):
    """The part of an entry in its neighbours' squared norms of keys, times the same of values.

    Paper: Sengupta et al. 2025, CurDKV, arXiv:2509.15038, which keeps columns and rows of large
    leverage, as a CUR decomposition does, and approximates leverage by squared norms. Each run of
    `run_length` entries shares among itself, as in public code, so that no part of the text is left
    out. Needs no queries, so a hit in the prefix cache changes nothing.
    """

    papers = (Paper("CurDKV", "Sengupta et al.", 2025, "2509.15038"),)

    run_length: Annotated[int, Field(ge=1, le=65536)] = 16
    """Entries that share, 16 in public code."""

    def score(self, context: CompactionContext) -> Scores:
        weights = self._shares(context.key_norms())
        weights *= self._shares(context.value_norms())
        return Scores(weights)

    def _shares(self, norms: Tensor) -> Tensor:
        """What part of the squares of its run each norm has."""
        num_entries = norms.shape[-1]
        runs = pad(norms.square_(), (0, -num_entries % self.run_length))
        runs = runs.unflatten(-1, (-1, self.run_length))
        runs /= runs.sum(-1, keepdim=True).clamp_(min=_EPS)
        return runs.flatten(-2)[..., :num_entries]
