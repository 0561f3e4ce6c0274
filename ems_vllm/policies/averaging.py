# SPDX-License-Identifier: Apache-2.0
"""What mergers have in common that average everything into what stays."""

from __future__ import annotations

from ems_vllm.ops import KeyMerge
from ems_vllm.policies.base import Merger


class AveragingMerger(Merger):
    """All that does not stay is a candidate; keys and values of a class become weighted means."""

    keep_mass: bool = False
    """Give a merged entry the attention of what it stands for (ours); with scorers that record
    queries."""

    @property
    def candidates_per_center(self) -> None:
        return None

    @property
    def key_merge(self) -> KeyMerge:
        return KeyMerge.MEAN

    @property
    def keeps_mass(self) -> bool:
        return self.keep_mass
