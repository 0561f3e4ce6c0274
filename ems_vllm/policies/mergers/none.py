# SPDX-License-Identifier: Apache-2.0
"""Eviction without merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.base import MERGERS, Merger, Selection

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@MERGERS.register("none")
class NoMerger(Merger):
    """What does not stay is dropped."""

    def assign(self, context: CompactionContext, selection: Selection) -> torch.Tensor:
        return torch.empty_like(selection.merge_idx)
