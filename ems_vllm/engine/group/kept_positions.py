# SPDX-License-Identifier: Apache-2.0
"""Which positions the entries of requests are of, after their compactions, of the latest requests.

For people who want to see what a method keeps; nothing that runs depends on it. What a compaction
keeps has another order in every kv_head, so positions are followed from one to the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm.engine.group.to_device import to_device
from ems_vllm.keys import LONGEST_NAME

if TYPE_CHECKING:
    from ems_vllm.engine.orders import Compaction

# What is made at a time of the entries of some layers.
_SLICE_ENTRIES = 1 << 21


@dataclass
class KeptEntries:
    """What the latest compaction of one request kept.

    Attributes:
        tail: Position behind what was compacted; from here on everything is held.
        num_computed: Tokens of the request when it was compacted.
        num_compactions: Of the request, up to this one.
        positions: [num_layers, num_kv_heads, most entries of a head], int32, on the host - position
            of every entry, -1 behind a head's own. On its way from the device until `arrived`.
    """

    tail: int
    num_computed: int
    num_compactions: int
    positions: torch.Tensor
    arrived: torch.cuda.Event | None = None

    def on_host(self) -> np.ndarray:
        """The positions, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found: np.ndarray = self.positions.numpy()
        return found

    @cached_property
    def num_held(self) -> int:
        """Entries of all layers and kv_heads."""
        return int(np.count_nonzero(self.on_host() >= 0))


@dataclass
class KeptPositions:
    """Of the requests of a group that were compressed last.

    Args:
        block_size: Tokens per block.
        device: Of the cache.
        num_requests: How many are remembered, whether they still run or not.
    """

    block_size: int
    device: torch.device
    num_requests: int
    _kept: OrderedDict[str, KeptEntries] = field(default_factory=OrderedDict)

    def __getitem__(self, req_id: str) -> KeptEntries:
        return self._kept[req_id]

    def latest(self) -> list[str]:
        """The requests, the last one that was compressed first."""
        return list(reversed(self._kept))

    def wave(self, orders: Sequence[Compaction]) -> PositionsWave:
        """Requests that are compacted together."""
        return PositionsWave(self, orders)

    def before(self, order: Compaction) -> KeptEntries | None:
        """What a request kept at its last compaction, if that is remembered and is the last one."""
        found = self._kept.get(order.req_id)
        if found is None or order.first_before == 0:
            # Preempted since: it begins anew.
            return None
        return found

    def put(self, req_id: str, entries: KeptEntries) -> None:
        self._kept[req_id] = entries
        self._kept.move_to_end(req_id)
        while len(self._kept) > self.num_requests:
            self._kept.popitem(last=False)


class PositionsWave:
    """Requests that are compacted together, layer by layer.

    Args:
        kept: Of the group.
        orders: Of these requests.
    """

    def __init__(self, kept: KeptPositions, orders: Sequence[Compaction]) -> None:
        self._kept = kept
        self._before = [kept.before(order) for order in orders]
        # By index of a request whose positions are known: of the layers so far. The latest ones of
        # many are enough.
        self._parts: dict[int, list[torch.Tensor]] = {
            at: []
            for at in range(len(orders))[-kept.num_requests :]
            if orders[at].first_before == 0 or self._before[at] is not None
            # A name of any length would stay when its request has gone.
            if len(orders[at].req_id) <= LONGEST_NAME
        }

    def keep(
        self,
        orders: Sequence[Compaction],
        layers: slice,
        kept_idx: torch.Tensor,
        held: np.ndarray | None = None,
    ) -> None:
        """Take note of what stays in some layers.

        Args:
            orders: Of the requests, as they were carried out.
            layers: Of the group; those of the last call go before.
            kept_idx: [num_layers, num_requests, num_kv_heads, max_budget], see Selection.
            held: [num_requests, num_kv_heads], int - entries that each head kept at the last
                compaction; None where all kept as many.
        """
        for at, parts in self._parts.items():
            order = orders[at]
            of_request = kept_idx[:, at]
            num_held = np.full(of_request.shape[1], self._num_held(at))
            if held is not None:
                num_held = held[at]
            tail_before = order.first_before * self._kept.block_size + int(num_held.mean())
            parts.append(self._positions(at, layers, of_request, num_held, tail_before))

    def _num_held(self, at: int) -> int:
        before = self._before[at]
        return 0 if before is None else before.positions.shape[-1]

    def _positions(
        self, at: int, layers: slice, kept_idx: torch.Tensor, held: np.ndarray, tail_before: int
    ) -> torch.Tensor:
        """[num_layers, num_kv_heads, max_budget], int32: of the entries with these indices."""
        device = self._kept.device
        num_held = to_device(held, device, torch.int32)[None, :, None]
        # Behind what was kept entries lie in the order of their positions.
        positions = torch.where(kept_idx < 0, kept_idx, kept_idx - num_held + tail_before)
        before = self._before[at]
        if before is None:
            return positions
        step = max(1, _SLICE_ENTRIES // (kept_idx.shape[1] * kept_idx.shape[2]))
        for first in range(0, len(kept_idx), step):
            part = slice(first, first + step)
            of_layers = slice(layers.start + first, min(layers.start + first + step, layers.stop))
            known = before.positions[of_layers].to(device, non_blocking=True)
            idx = kept_idx[part]
            is_known = (idx >= 0) & (idx < num_held)
            found = known.gather(-1, idx.clamp(0, known.shape[-1] - 1).long())
            positions[part] = torch.where(is_known, found, positions[part])
        return positions

    def end(self, orders: Sequence[Compaction], num_kept: Sequence[int]) -> None:
        """All layers have been compacted.

        Args:
            orders: As they were carried out.
            num_kept: By request, entries of its longest kv_head in any layer.
        """
        for at, parts in self._parts.items():
            order, before, width = orders[at], self._before[at], num_kept[at]
            padded = [
                torch.nn.functional.pad(part, (0, max(0, width - part.shape[-1])), value=-1)
                for part in parts
            ]
            kept = torch.cat([part[..., :width] for part in padded])
            positions, arrived = _to_host(kept)
            entries = KeptEntries(
                tail=order.tail * self._kept.block_size,
                num_computed=order.num_computed,
                num_compactions=1 + (0 if before is None else before.num_compactions),
                positions=positions,
                arrived=arrived,
            )
            self._kept.put(order.req_id, entries)


def _to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy that is on its way, and what says that it is there."""
    if tensor.device.type != "cuda":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived
