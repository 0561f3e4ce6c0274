# SPDX-License-Identifier: Apache-2.0
"""Runs the policy over the requests that are to be compacted, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.engine.host_tensors import pad_rows, to_device
from ems_vllm.engine.score_rows import score_pages
from ems_vllm.policies.context import CompactionContext

if TYPE_CHECKING:
    from ems_vllm.engine.compressed_group import GroupTensors
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
    """

    def __init__(self, tensors: GroupTensors, policy: Policy, workspace_bytes: int) -> None:
        self._tensors = tensors
        self._policy = policy
        self._block_size = tensors.spec.block_size
        self._max_entries = policy.max_entries(workspace_bytes, tensors.spec.num_kv_heads)
        self.counters = CompactionCounters()

    @torch.inference_mode()
    def compact(self, orders: Sequence[Compaction]) -> None:
        """Compress requests, before the step's forward pass."""
        for wave, max_layers in self._waves(orders):
            for stack in self._tensors.stacks:
                for part in stack.split(max_layers):
                    self._policy.compact(self._context(wave, part))
        for order in orders:
            self.counters.num_compactions += 1
            self.counters.num_entries_in += self._num_entries(order)
            self.counters.num_entries_kept += self._num_kept(order)

    def _num_entries(self, order: Compaction) -> int:
        return (order.tail - order.first_before) * self._block_size

    def _num_kept(self, order: Compaction) -> int:
        return (order.tail - order.first) * self._block_size

    def _waves(self, orders: Sequence[Compaction]) -> Iterator[tuple[list[Compaction], int]]:
        """Split the work so that what the policy allocates for a wave fits the workspace.

        Yields:
            (requests, most layers at a time); requests of similar length together, because a wave
            pads to its longest.
        """
        num_layers = self._tensors.num_layers
        wave: list[Compaction] = []
        for order in sorted(orders, key=self._num_entries):
            size = self._num_entries(order)
            if wave and (len(wave) + 1) * size * num_layers > self._max_entries:
                yield wave, self._max_layers(wave)
                wave = []
            wave.append(order)
        if wave:
            yield wave, self._max_layers(wave)

    def _max_layers(self, wave: list[Compaction]) -> int:
        """A single request may exceed the workspace; its layers are taken in turns then."""
        per_layer = len(wave) * self._num_entries(wave[-1])
        return max(1, min(self._tensors.num_layers, self._max_entries // per_layer))

    def _context(self, wave: list[Compaction], stack: LayerStack) -> CompactionContext:
        tensors = self._tensors
        device = tensors.device
        budgets = [self._num_kept(order) for order in wave]
        num_entries = [self._num_entries(order) for order in wave]
        num_sinks = self._policy.selector.num_sink_tokens

        def ints(values: list[int]) -> torch.Tensor:
            return to_device(values, device)

        scores = score_table = ring = key_scales = None
        if tensors.scores is not None:
            scores = tensors.scores[stack.layers]
            score_table = pad_rows([_live_score_pages(order) for order in wave], device)
        if tensors.query_ring is not None:
            ring = tensors.query_ring[stack.layers]
        if tensors.key_scales is not None:
            key_scales = tensors.key_scales[stack.layers]
        return CompactionContext(
            key_cache=stack.key_cache,
            value_cache=stack.value_cache,
            block_table=pad_rows([order.block_ids for order in wave], device),
            num_entries=ints(num_entries),
            num_live=ints([o.num_computed - o.first_before * self._block_size for o in wave]),
            num_scored=ints([order.num_scored for order in wave]),
            budgets=ints(budgets),
            num_protected=ints([min(num_sinks, budget) for budget in budgets]),
            target_columns=ints([order.first - order.first_before for order in wave]),
            num_represented=ints([order.num_represented for order in wave]),
            max_entries=max(num_entries),
            max_budget=max(budgets),
            scale=tensors.scale,
            paged_scores=scores,
            score_table=score_table,
            query_ring=ring,
            ring_rows=ints([order.ring_row for order in wave]),
            num_queries=ints([order.num_queries for order in wave]),
            end_positions=ints([order.num_computed for order in wave]),
            is_untouched=to_device([order.first_before == 0 for order in wave], device, torch.bool),
            key_scales=key_scales,
            rotations=tensors.rotations[stack.layers],
        )


def _live_score_pages(order: Compaction) -> list[int]:
    """Score page of every column that is compressed."""
    num_columns = order.tail - order.first_before
    return score_pages(order.score_pages, order.block_ids)[:num_columns]
