# SPDX-License-Identifier: Apache-2.0
"""Runs the policy over the requests that are to be compacted, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm.engine.compaction_context import context_of, context_of_heads, with_targets
from ems_vllm.engine.compaction_rows import CompactionRows, by_head, dealt, rows_of

if TYPE_CHECKING:
    from ems_vllm.engine.compressed_group import GroupTensors
    from ems_vllm.engine.head_tables import HeadTables
    from ems_vllm.engine.layer_stack import LayerStack
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.policies.policy import Policy


@dataclass
class CompactionCounters:
    """What has been compacted since the start."""

    num_compactions: int = 0
    num_entries_in: int = 0
    num_entries_kept: int = 0


class Compactor:
    """Compacts the requests of one group.

    Args:
        tensors: The group's cache, scores and query ring.
        policy: What stays and what is merged.
        workspace_bytes: Bound of what the policy allocates; exceeded only where a single layer of a
            single request does.
        heads: What kv_heads own; None where all of a layer keep as much.
    """

    def __init__(
        self,
        tensors: GroupTensors,
        policy: Policy,
        workspace_bytes: int,
        heads: HeadTables | None = None,
    ) -> None:
        self._tensors = tensors
        self._policy = policy
        self._heads = heads
        self._block_size = tensors.spec.block_size
        self._num_sinks = policy.selector.num_sink_tokens
        num_heads = tensors.spec.num_kv_heads
        if heads is None:
            self._max_entries = policy.max_entries(workspace_bytes, num_heads)
        else:
            # Each is a row.
            self._max_entries = policy.max_entries(workspace_bytes, 1) // num_heads
        self.counters = CompactionCounters()

    @torch.inference_mode()
    def compact(self, orders: Sequence[Compaction]) -> None:
        """Compress requests, before the step's forward pass."""
        for wave, max_layers in self._waves(orders):
            requests = rows_of(wave, self._block_size, self._num_sinks)
            if self._heads is None:
                self._compact_requests(requests, max_layers)
            else:
                self._compact_heads(requests, wave, self._heads)
        for order in orders:
            self.counters.num_compactions += 1
            self.counters.num_entries_in += self._num_entries(order)
            self.counters.num_entries_kept += self._num_kept(order)

    def _compact_requests(self, requests: CompactionRows, max_layers: int) -> None:
        for stack in self._tensors.stacks:
            for part in stack.split(max_layers):
                self._policy.compact(context_of(self._tensors, requests, part))

    def _compact_heads(
        self, requests: CompactionRows, wave: Sequence[Compaction], heads: HeadTables
    ) -> None:
        req_ids = [order.req_id for order in wave]
        owned, shared = heads.owned(req_ids), heads.deal(wave)
        kept = np.empty_like(owned) if shared is None else shared
        for stack in self._tensors.stacks:
            for part in stack.split(1):
                layer = part.layers.start
                rows = by_head(requests, owned[layer], self._block_size)
                if shared is None:
                    kept[layer] = self._deal_and_compact(requests, rows, part)
                else:
                    rows = dealt(rows, requests, kept[layer], self._block_size)
                    self._policy.compact(context_of_heads(self._tensors, requests, rows, part))
        heads.own(req_ids, kept)

    def _deal_and_compact(
        self, requests: CompactionRows, rows: CompactionRows, layer: LayerStack
    ) -> np.ndarray:
        """Compact a layer whose kv_heads, the rows, share what it keeps by their scores.

        Returns:
            [num_requests, num_heads]: pages that each keeps.
        """
        context = context_of_heads(self._tensors, requests, rows, layer)
        scores = self._policy.score(context)
        budgets = requests.budgets.tolist()
        kept: np.ndarray = self._policy.allocator.deal(context, scores, budgets).numpy()
        rows = dealt(rows, requests, kept, self._block_size)
        self._policy.place(with_targets(context, rows), scores)
        return kept

    def _num_entries(self, order: Compaction) -> int:
        return (order.tail - order.first_before) * self._block_size

    def _longest(self, order: Compaction) -> int:
        """Entries of the longest kv_head."""
        if self._heads is None:
            return self._num_entries(order)
        (beyond,) = self._heads.most_beyond(self._heads.places([order.req_id]))
        return self._num_entries(order) + int(beyond) * self._block_size

    def _num_kept(self, order: Compaction) -> int:
        return (order.tail - order.first) * self._block_size

    def _waves(self, orders: Sequence[Compaction]) -> Iterator[tuple[list[Compaction], int]]:
        """Split the work so that what the policy allocates for a wave fits the workspace.

        Yields:
            (requests, most layers at a time); requests of similar length together, because a wave
            pads to its longest.
        """
        # Heads are compressed a layer at a time.
        num_layers = self._tensors.num_layers if self._heads is None else 1
        wave: list[Compaction] = []
        for order in sorted(orders, key=self._longest):
            size = self._longest(order)
            if wave and (len(wave) + 1) * size * num_layers > self._max_entries:
                yield wave, self._max_layers(wave)
                wave = []
            wave.append(order)
        if wave:
            yield wave, self._max_layers(wave)

    def _max_layers(self, wave: list[Compaction]) -> int:
        """A single request may exceed the workspace; its layers are taken in turns then."""
        per_layer = len(wave) * self._longest(wave[-1])
        return max(1, min(self._tensors.num_layers, self._max_entries // per_layer))
