# SPDX-License-Identifier: Apache-2.0
"""Runs the policy over the requests that are to be compacted, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm.engine.group.compaction_context import context_of, context_of_heads, with_targets
from ems_vllm.engine.group.compaction_rows import CompactionRows, by_head, dealt, rows_of
from ems_vllm.engine.group.covering import Covering
from ems_vllm.engine.group.protection import ProtectedEntries, ProtectedWave, num_reserved
from ems_vllm.engine.group.ranks import Ranks

if TYPE_CHECKING:
    from ems_vllm.engine.group.divergence import Divergence
    from ems_vllm.engine.group.head_tables import HeadTables
    from ems_vllm.engine.group.kept_positions import KeptPositions, PositionsWave
    from ems_vllm.engine.group.layer_stack import LayerStack
    from ems_vllm.engine.group.tensors import GroupTensors
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.policies.context import CompactionContext
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
        ranks: Others that hold kv_heads of the same layers.
        positions: Follows what entries are of, for those who want to see it; None for nobody.
        divergence: Measures what compactions change that are to be measured; None where another
            worker does.

    Attributes:
        protected: What requests protect.
        num_merged: [], int64, on the device - entries of all layers and kv_heads that were merged
            since the start.
    """

    def __init__(
        self,
        tensors: GroupTensors,
        policy: Policy,
        workspace_bytes: int,
        heads: HeadTables | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        positions: KeptPositions | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        self._tensors = tensors
        self._positions = positions
        self._divergence = divergence
        self._policy = policy
        self._heads = heads
        self._block_size = tensors.spec.block_size
        self._num_sinks = policy.selector.num_sink_tokens
        self._workspace_bytes = workspace_bytes
        self._ranks = ranks
        self._covering = None
        if policy.coverage is not None:
            num_heads = tensors.num_layers * tensors.spec.num_kv_heads
            self._covering = Covering(
                policy.coverage, num_heads, self._block_size, self._num_sinks, ranks
            )
        self.counters = CompactionCounters()
        self.num_merged = torch.zeros((), dtype=torch.int64, device=tensors.device)
        self.protected = ProtectedEntries(self._block_size, tensors.device)

    @torch.inference_mode()
    def compact(self, orders: Sequence[Compaction]) -> dict[str, int]:
        """Compress requests, before the step's forward pass.

        Returns:
            By request, the first column of what is kept: that of the order, or a later one where a
            coverage decides.
        """
        kept_from = {}
        for wave, max_layers in self._waves(orders):
            if self._heads is not None:
                self._compact_heads(wave, self._heads)
            elif self._covering is None or all(order.num_kept for order in wave):
                self._compact_requests(wave, max_layers)
            else:
                wave = self._compact_covered(wave, max_layers, self._covering)
            for order in wave:
                self.counters.num_compactions += 1
                self.counters.num_entries_in += self._num_entries(order)
                self.counters.num_entries_kept += self._num_kept(order)
                kept_from[order.req_id] = order.first
        return kept_from

    def _rows(self, wave: Sequence[Compaction]) -> CompactionRows:
        return rows_of(wave, self._block_size, self._num_sinks)

    def _parts(self, max_layers: int) -> list[LayerStack]:
        """Layers of the group, so many at a time at most."""
        return [part for stack in self._tensors.stacks for part in stack.split(max_layers)]

    def _context(
        self, requests: CompactionRows, part: LayerStack, protected: ProtectedWave | None
    ) -> CompactionContext:
        context = context_of(self._tensors, requests, part, self._ranks)
        mask = None
        if protected is not None:
            mask = protected.of_requests(part.layers, context.num_kv_heads, context.max_entries)
        return replace(context, is_protected=mask, num_merged=self.num_merged)

    def _compact_requests(self, wave: Sequence[Compaction], max_layers: int) -> None:
        requests, protected = self._rows(wave), self.protected.wave(wave)
        positions = self._positions_of(wave)
        for part in self._parts(max_layers):
            context = self._context(requests, part, protected)
            with self._measuring(wave, context):
                kept_idx = self._policy.compact(context)
            if protected is not None:
                protected.keep(kept_idx)
            if positions is not None:
                positions.keep(wave, part.layers, kept_idx)
        if protected is not None:
            protected.end(requests.budgets.tolist())
        if positions is not None:
            positions.end(wave, requests.budgets.tolist())

    def _measuring(
        self, wave: Sequence[Compaction], context: CompactionContext
    ) -> AbstractContextManager[None]:
        """Around what writes the kept entries of a wave, in some layers."""
        if self._divergence is None or not wave[0].is_measured:
            return nullcontext()
        (order,) = wave
        num_tail = order.num_computed - order.tail * self._block_size
        return self._divergence.around(context, order.req_id, num_tail)

    def _positions_of(self, wave: Sequence[Compaction]) -> PositionsWave | None:
        return None if self._positions is None else self._positions.wave(wave)

    def _compact_covered(
        self, wave: Sequence[Compaction], max_layers: int, covering: Covering
    ) -> list[Compaction]:
        """Compact requests that keep what a coverage says, which all their layers decide together.

        Returns:
            The orders, with what was kept.
        """
        requests, parts = self._rows(wave), self._parts(max_layers)
        protected = self.protected.wave(wave)
        if len(parts) > 1:
            # Scores of all layers have no room at a time, so they are made twice.
            shares = [self._shares(requests, part, protected) for part in parts]
            decided = covering.decided(wave, torch.stack(shares).sum(0))
            self._compact_requests(decided, max_layers)
            return decided
        (part,) = parts
        positions = self._positions_of(wave)
        context = self._context(requests, part, protected)
        scores = self._policy.score(context)
        decided = covering.decided(wave, self._policy.held_shares(context, scores))
        kept = self._rows(decided)
        context = with_targets(context, kept)
        with self._measuring(wave, context):
            kept_idx = self._policy.place(context, scores)
        if protected is not None:
            protected.keep(kept_idx)
            protected.end(kept.budgets.tolist())
        if positions is not None:
            positions.keep(decided, part.layers, kept_idx)
            positions.end(decided, kept.budgets.tolist())
        return decided

    def _shares(
        self, requests: CompactionRows, part: LayerStack, protected: ProtectedWave | None
    ) -> torch.Tensor:
        context = self._context(requests, part, protected)
        return self._policy.held_shares(context, self._policy.score(context))

    def _compact_heads(self, wave: Sequence[Compaction], heads: HeadTables) -> None:
        requests, protected = self._rows(wave), self.protected.wave(wave)
        positions = self._positions_of(wave)
        req_ids = [order.req_id for order in wave]
        owned, shared = heads.owned(req_ids), heads.deal(wave, self._least_pages(wave))
        kept = np.empty_like(owned) if shared is None else shared
        for stack in self._tensors.stacks:
            for part in stack.split(1):
                layer = part.layers.start
                rows = by_head(requests, owned[layer], self._block_size)
                if shared is not None:
                    rows = dealt(rows, requests, kept[layer], self._block_size)
                context = context_of_heads(self._tensors, requests, rows, part)
                mask = None
                if protected is not None:
                    held = owned[layer] * self._block_size
                    mask = protected.of_heads(layer, held, context.max_entries)
                context = replace(context, is_protected=mask, num_merged=self.num_merged)
                if shared is None:
                    kept[layer], kept_idx = self._deal_and_compact(wave, requests, rows, context)
                else:
                    with self._measuring(wave, context):
                        kept_idx = self._policy.compact(context)
                if protected is not None:
                    protected.keep(kept_idx)
                if positions is not None:
                    held = owned[layer] * self._block_size
                    of_heads = kept_idx.view(1, *held.shape, -1)
                    positions.keep(wave, part.layers, of_heads, held)
        heads.own(req_ids, kept)
        longest = (kept.max((0, 2)) * self._block_size).tolist()
        if protected is not None:
            protected.end(longest)
        if positions is not None:
            positions.end(wave, longest)

    def _deal_and_compact(
        self,
        wave: Sequence[Compaction],
        requests: CompactionRows,
        rows: CompactionRows,
        context: CompactionContext,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Compact a layer whose kv_heads, the rows, share what it keeps by their scores.

        Returns:
            [num_requests, num_heads]: pages that each keeps; and kept_idx, see Selection.
        """
        scores = self._policy.score(context)
        budgets = requests.budgets.tolist()
        kept: np.ndarray = self._policy.allocator.deal(context, scores, budgets).numpy()
        rows = dealt(rows, requests, kept, self._block_size)
        context = with_targets(context, rows)
        with self._measuring(wave, context):
            return kept, self._policy.place(context, scores)

    def _least_pages(self, orders: Sequence[Compaction]) -> list[int]:
        """By order, pages that any kv_head needs for what it must keep."""
        return [
            # Sinks alone take what there is: a page may be smaller than they are.
            max(1, -(-num_reserved(order, self._num_sinks, self._block_size) // self._block_size))
            if order.protected
            else 1
            for order in orders
        ]

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
            pads to its longest, and one that is measured by itself, which bounds what that takes.
        """
        # Heads are compressed a layer at a time.
        num_layers = self._tensors.num_layers if self._heads is None else 1
        max_entries = self._max_entries(any(order.protected for order in orders))
        wave: list[Compaction] = []
        for order in sorted(orders, key=self._longest):
            size = self._longest(order)
            if order.is_measured:
                yield [order], self._max_layers([order], max_entries)
                continue
            if wave and (len(wave) + 1) * size * num_layers > max_entries:
                yield wave, self._max_layers(wave, max_entries)
                wave = []
            wave.append(order)
        if wave:
            yield wave, self._max_layers(wave, max_entries)

    def _max_entries(self, protects: bool) -> int:
        """Entries that fit the workspace, of requests as rows."""
        num_heads = self._tensors.spec.num_kv_heads
        fits = partial(self._policy.max_entries, self._workspace_bytes, protects=protects)
        # Where heads are compressed by themselves, each is a row.
        return fits(num_heads) if self._heads is None else fits(1) // num_heads

    def _max_layers(self, wave: list[Compaction], max_entries: int) -> int:
        """A single request may exceed the workspace; its layers are taken in turns then."""
        per_layer = len(wave) * self._longest(wave[-1])
        return max(1, min(self._tensors.num_layers, max_entries // per_layer))
