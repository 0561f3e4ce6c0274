# SPDX-License-Identifier: Apache-2.0
"""Which requests are due for compaction, and running the policy over them in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ems_vllm.engine.host_tensors import pad_rows, to_device
from ems_vllm.policies.context import CompactionContext

if TYPE_CHECKING:
    from ems_vllm.engine.compressed_group import GroupTensors
    from ems_vllm.engine.group_state import GroupStates, RequestState
    from ems_vllm.engine.layer_stack import LayerStack
    from ems_vllm.engine.request_table import RunningRequest
    from ems_vllm.policies.policy import Policy


@dataclass(frozen=True)
class DueRequest:
    """A compaction to run now, from columns [state.first, tail) into [first, tail)."""

    request: RunningRequest
    state: RequestState
    first: int
    tail: int

    @property
    def num_entries(self) -> int:
        return (self.tail - self.state.first) * self.state.plan.block_size

    @property
    def num_kept(self) -> int:
        return (self.tail - self.first) * self.state.plan.block_size


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
        states: States of its requests.
        policy: What stays and what is merged.
        workspace_bytes: Bound of what the policy allocates; exceeded only where a single layer of a
            single request does.
    """

    def __init__(
        self, tensors: GroupTensors, states: GroupStates, policy: Policy, workspace_bytes: int
    ) -> None:
        self._tensors = tensors
        self._states = states
        self._policy = policy
        self._max_entries = policy.max_entries(workspace_bytes, tensors.spec.num_kv_heads)
        self.counters = CompactionCounters()

    @torch.inference_mode()
    def compact_due(self, requests: Sequence[RunningRequest]) -> None:
        """Compress every request of a step that is due, before the step's forward pass."""
        due = list(self._due(requests))
        for wave, max_layers in self._waves(due):
            for stack in self._tensors.stacks:
                for part in stack.split(max_layers):
                    self._policy.compact(self._context(wave, part))
        for item in due:
            self.counters.num_compactions += 1
            self.counters.num_entries_in += item.num_entries
            self.counters.num_entries_kept += item.num_kept
            self._states.compacted(item.state, item.first, item.tail)

    def _due(self, requests: Sequence[RunningRequest]) -> Iterator[DueRequest]:
        for request in requests:
            state = self._states[request]
            first, tail = state.plan.columns(request.num_computed)
            if first > state.first:
                yield DueRequest(request, state, first, tail)

    def _waves(self, due: list[DueRequest]) -> Iterator[tuple[list[DueRequest], int]]:
        """Split the work so that what the policy allocates for a wave fits the workspace.

        Yields:
            (requests, most layers at a time); requests of similar length together, because a wave
            pads to its longest.
        """
        num_layers = self._tensors.num_layers
        wave: list[DueRequest] = []
        for item in sorted(due, key=lambda item: item.num_entries):
            if wave and (len(wave) + 1) * item.num_entries * num_layers > self._max_entries:
                yield wave, self._max_layers(wave)
                wave = []
            wave.append(item)
        if wave:
            yield wave, self._max_layers(wave)

    def _max_layers(self, wave: list[DueRequest]) -> int:
        """A single request may exceed the workspace; its layers are taken in turns then."""
        per_layer = len(wave) * wave[-1].num_entries
        return max(1, min(self._tensors.num_layers, self._max_entries // per_layer))

    def _context(self, wave: list[DueRequest], stack: LayerStack) -> CompactionContext:
        tensors = self._tensors
        device, block_size = tensors.device, tensors.spec.block_size
        budgets = [item.num_kept for item in wave]
        num_sinks = self._policy.selector.num_sink_tokens

        def ints(values: list[int]) -> torch.Tensor:
            return to_device(values, device)

        return CompactionContext(
            key_cache=stack.key_cache,
            value_cache=stack.value_cache,
            block_table=pad_rows([self._live_columns(item) for item in wave], device),
            num_entries=ints([item.num_entries for item in wave]),
            num_live=ints(
                [item.request.num_computed - item.state.first * block_size for item in wave]
            ),
            num_scored=ints([self._num_scored(item) for item in wave]),
            budgets=ints(budgets),
            num_protected=ints([min(num_sinks, budget) for budget in budgets]),
            target_columns=ints([item.first - item.state.first for item in wave]),
            num_represented=ints([_num_represented(item) for item in wave]),
            max_entries=max(item.num_entries for item in wave),
            max_budget=max(budgets),
            scale=tensors.scale,
            paged_scores=None if tensors.scores is None else tensors.scores[stack.layers],
            score_table=(
                None
                if tensors.scores is None
                else pad_rows([self._score_pages(item) for item in wave], device)
            ),
            query_ring=None if tensors.query_ring is None else tensors.query_ring[stack.layers],
            ring_rows=ints([item.request.ring_row for item in wave]),
            num_queries=ints(
                [
                    min(tensors.obs_window, item.request.num_computed - item.request.num_cached)
                    for item in wave
                ]
            ),
            end_positions=ints([item.request.num_computed for item in wave]),
            key_scales=None if tensors.key_scales is None else tensors.key_scales[stack.layers],
        )

    def _live_columns(self, item: DueRequest) -> list[int]:
        stop = -(-item.request.num_computed // self._tensors.spec.block_size)
        return item.request.block_ids[self._tensors.group_id][item.state.first : stop]

    def _score_pages(self, item: DueRequest) -> list[int]:
        block_ids = item.request.block_ids[self._tensors.group_id]
        return item.state.pages(block_ids)[item.state.first : item.tail]

    def _num_scored(self, item: DueRequest) -> int:
        if item.state.first > 0:
            return item.state.num_carried
        if self._tensors.scores is None or not item.state.plan.compresses_prompt:
            return 0
        return min(item.num_entries, item.request.info.prompt_len)


def _num_represented(item: DueRequest) -> int:
    """Tokens whose queries were not accumulated; see CompactionContext."""
    plan, state = item.state.plan, item.state
    last = plan.prompt_len if plan.compresses_prompt else 0
    if state.first > 0:
        # When its tail had a recent window behind it; the first one waited for the prompt's end.
        last = max(plan.prompt_len, plan.recent_window + state.tail * plan.block_size)
    return item.request.num_computed - last
