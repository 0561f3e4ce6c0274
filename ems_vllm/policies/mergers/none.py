# SPDX-License-Identifier: Apache-2.0
"""Eviction without merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.base import MERGERS, Classes, Merger

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scores, Selection
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("none")
class NoMerger(Merger):
    """What does not stay is dropped."""

    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        return Classes(torch.empty_like(selection.merge_idx))
