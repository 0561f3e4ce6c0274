# SPDX-License-Identifier: Apache-2.0
"""One KV-cache group on a worker: its tensors and what its requests own and protect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ems_vllm.engine.group.compactor import Compactor
from ems_vllm.engine.group.ranks import Ranks

if TYPE_CHECKING:
    from ems_vllm.engine.group.divergence import Divergence
    from ems_vllm.engine.group.head_tables import HeadTables
    from ems_vllm.engine.group.kept_positions import KeptPositions
    from ems_vllm.engine.group.tensors import GroupTensors
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.policies.policy import Policy


class CompressedGroup:
    """Compresses the layers of one KV-cache group.

    Args:
        tensors: Its tensors.
        layer_names: Its layers, in the order of the tensors.
        policy: Chooses what stays and what is merged.
        workspace_bytes: Bound of the scratch memory of a compaction.
        heads: Pages that kv_heads own; None where all of a layer keep as much.
        ranks, positions, divergence: See Compactor.

    Attributes:
        heads, positions, divergence: As given.
        counters: What was compacted since the start.
        num_merged: See Compactor.
    """

    def __init__(
        self,
        tensors: GroupTensors,
        layer_names: Sequence[str],
        policy: Policy,
        workspace_bytes: int,
        heads: HeadTables | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        positions: KeptPositions | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        self.tensors = tensors
        self.layer_names = list(layer_names)
        self.heads = heads
        self.positions = positions
        self.divergence = divergence
        self._compactor = Compactor(
            tensors, policy, workspace_bytes, heads, ranks, positions, divergence
        )
        self.counters = self._compactor.counters
        self.num_merged = self._compactor.num_merged

    @property
    def num_heads(self) -> int:
        """Kv_heads of all its layers, on this rank."""
        return self.tensors.num_layers * self.tensors.spec.num_kv_heads

    def release(self, req_ids: Sequence[str]) -> None:
        """Requests gave their blocks back."""
        self._compactor.protected.release(req_ids)
        if self.heads is not None:
            self.heads.release(req_ids)

    def compact(self, orders: Sequence[Compaction]) -> dict[str, int]:
        """Compress requests of this group, before anything of the step runs.

        Returns:
            By request, the first column of what is kept.
        """
        return self._compactor.compact(orders)
