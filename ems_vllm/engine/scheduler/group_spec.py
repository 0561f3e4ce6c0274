# SPDX-License-Identifier: Apache-2.0
"""What the scheduler reads of the KV-cache spec of a compressed group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ems_vllm.engine.observation import ObservationSettings
    from ems_vllm.plan import PlanSettings


class GroupSpec(Protocol):
    """Implemented by CompressedAttentionSpec, which names its manager and so stands above it."""

    @property
    def block_size(self) -> int: ...

    @property
    def settings(self) -> PlanSettings: ...

    @property
    def observation(self) -> ObservationSettings: ...

    @property
    def num_score_pages(self) -> int: ...

    def num_ring_rows(self, num_blocks: int, max_num_seqs: int) -> int: ...
