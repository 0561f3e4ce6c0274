# SPDX-License-Identifier: Apache-2.0
"""Kept entries become the means of clusters of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from ems_vllm import ops
from ems_vllm.policies.averaging import AveragingMerger
from ems_vllm.policies.base import MERGERS, Classes
from ems_vllm.policies.centres import entry_weights
from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("clusters")
class ClustersMerger(AveragingMerger):
    """Every dropped entry joins the kept entry with the most similar key; all count alike.

    After ClusterKV (Liu et al. 2024, arXiv:2412.03213), Multipole Attention (Hooper et al. 2025,
    arXiv:2506.13059) and SubGen (Zandieh et al. 2024, arXiv:2402.06082), which find clusters of
    keys. What these papers do with them is not served: the first two keep the whole cache and look
    up whole clusters at each step, and SubGen samples entries of each. Served is what remains where
    nothing is kept beside the clusters: one step of k-means from the entries that a scorer prefers,
    and Multipole's approximation of a cluster by its mean key and value, weighted by how many
    entries it has (`keep_mass`).
    """

    papers = (
        Paper("ClusterKV", "Liu et al.", 2024, "2412.03213"),
        Paper("Multipole Attention", "Hooper et al.", 2025, "2506.13059"),
        Paper("SubGen", "Zandieh et al.", 2024, "2402.06082"),
    )

    keep_mass: bool = True
    """Give a cluster the attention of as many entries as it has; with scorers that record
    queries."""

    least_similarity: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Cosine of keys below which an entry joins no cluster and is dropped."""

    @property
    def num_merge_tensors(self) -> int:
        return 8

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        ones = torch.ones_like(selection.merge_idx, dtype=torch.float32)
        weights = entry_weights(context, selection, ones)
        return Classes(nearest_key(context, selection, self.least_similarity), weights)


def nearest_key(
    context: CompactionContext, selection: Selection, least_similarity: float
) -> torch.Tensor:
    """class_idx of Classes: the kept entry whose key is most similar, by its cosine."""
    class_idx = torch.empty_like(selection.merge_idx)
    # Keys in the place of values: the product of both cosines is the square of one.
    ops.assign_classes(
        context.key_cache,
        context.key_cache,
        context.block_table,
        selection.kept_idx,
        selection.merge_idx,
        context.budgets,
        context.num_protected,
        least_similarity**2,
        class_idx,
    )
    return class_idx
