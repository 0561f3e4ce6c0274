# SPDX-License-Identifier: Apache-2.0
"""Which entries of its requests a worker must not drop, of one KV-cache group.

Before its first compaction entry e of a request is that of position e, so positions say it. What a
compaction keeps has another order in every kv_head; so of each request that protects something a
worker remembers which of the kept entries are protected, until it gives its blocks back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm.engine.group.to_device import to_device
from ems_vllm.policies.protection import kept_of
from ems_vllm.spans import num_covered

if TYPE_CHECKING:
    from ems_vllm.engine.orders import Compaction


class ProtectedEntries:
    """The protected entries of a group's requests.

    Args:
        block_size: Tokens per block.
        device: Of the cache.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        # By request, [num_layers, num_kv_heads, most entries of a head], bool, of kept entries.
        self._kept: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Requests that protect entries and were compressed."""
        return len(self._kept)

    def release(self, req_ids: Iterable[str]) -> None:
        """Requests gave their blocks back."""
        for req_id in req_ids:
            self._kept.pop(req_id, None)

    def wave(self, orders: Sequence[Compaction]) -> ProtectedWave | None:
        """What some requests protect that are compacted together; None for nothing."""
        if not any(order.protected for order in orders):
            return None
        return ProtectedWave(orders, self._kept, self._block_size, self._device)


class ProtectedWave:
    """Requests that are compacted together, layer by layer, some of which protect entries.

    Args:
        orders: Of these requests.
        kept: By request, which of the entries that it holds are protected; see ProtectedEntries.
            Those of these requests are replaced by `end`.
        block_size: Tokens per block.
        device: Of the cache.
    """

    def __init__(
        self,
        orders: Sequence[Compaction],
        kept: dict[str, torch.Tensor],
        block_size: int,
        device: torch.device,
    ) -> None:
        self._orders = orders
        self._kept = kept
        self._block_size = block_size
        self._device = device
        # By index of a request that protects something: of the layers so far.
        self._parts: dict[int, list[torch.Tensor]] = {
            at: [] for at, order in enumerate(orders) if order.protected
        }
        self._mask: torch.Tensor | None = None

    def of_requests(self, layers: slice, num_kv_heads: int, max_entries: int) -> torch.Tensor:
        """[num_layers, num_requests, num_kv_heads, max_entries], bool: the entry is protected.

        Args:
            layers: Of the group; whose kv_heads hold equally many entries.
        """
        held = np.zeros((len(self._orders), 1), np.int64)
        for at in self._parts:
            of_request = self._kept.get(self._orders[at].req_id)
            held[at] = 0 if of_request is None else of_request.shape[-1]
        return self._of(layers, held, num_kv_heads, max_entries)

    def of_heads(self, layer: int, held: np.ndarray, max_entries: int) -> torch.Tensor:
        """[1, num_requests * num_kv_heads, 1, max_entries], bool: the same, each head a row.

        Args:
            layer: Of the group.
            held: [num_requests, num_kv_heads], int - entries that each head kept at the last
                compaction; 0 before the first one.
        """
        mask = self._of(slice(layer, layer + 1), held, held.shape[1], max_entries)
        return mask.flatten(1, 2)[:, :, None]

    def _of(
        self, layers: slice, held: np.ndarray, num_kv_heads: int, max_entries: int
    ) -> torch.Tensor:
        found = to_device(self._by_position(held, max_entries), self._device, torch.bool)
        num_layers = layers.stop - layers.start
        mask = found[None].repeat(num_layers, 1, num_kv_heads // found.shape[1], 1)
        for at in self._parts:
            of_request = self._kept.get(self._orders[at].req_id)
            if of_request is not None:
                # Heads that kept less than the longest one of any layer protect nothing there.
                of_layers = of_request[layers, :, :max_entries]
                mask[:, at, :, : of_layers.shape[-1]] |= of_layers
        self._mask = mask
        return mask

    def _by_position(self, held: np.ndarray, max_entries: int) -> np.ndarray:
        """[num_requests, num_heads, max_entries], bool: protected ones of the entries behind those
        that were kept, which lie in the order of their positions."""
        mask = np.zeros((*held.shape, max_entries), bool)
        for at in self._parts:
            order = self._orders[at]
            # The columns of what was kept are as many for all heads together as for equal heads.
            tail_before = order.first_before * self._block_size + int(held[at].mean())
            # There may be a thousand ranges: they are gone through once, and not for every head.
            behind = np.zeros(max(0, order.tail * self._block_size - tail_before), bool)
            for start, stop in order.protected:
                behind[max(0, start - tail_before) : max(0, stop - tail_before)] = True
            for head, num_held in enumerate(held[at]):
                row = mask[at, head, num_held:]
                row[: len(behind)] = behind[: len(row)]
        return mask

    def keep(self, kept_idx: torch.Tensor) -> None:
        """Take note of what stays in the layers that the last mask was of.

        Args:
            kept_idx: See Selection; of requests as rows, or of their kv_heads.
        """
        assert self._mask is not None
        mask, self._mask = self._mask, None
        kept = kept_of(mask, kept_idx.view(*mask.shape[:3], -1))
        for at, parts in self._parts.items():
            parts.append(kept[:, at])

    def end(self, num_kept: Sequence[int]) -> None:
        """All layers have been compacted.

        Args:
            num_kept: By request, entries of its longest kv_head in any layer.
        """
        for at, parts in self._parts.items():
            width = num_kept[at]
            # Of an index that is -1, behind a head's own, nothing is protected.
            padded = [
                torch.nn.functional.pad(part, (0, max(0, width - part.shape[-1])))[..., :width]
                for part in parts
            ]
            self._kept[self._orders[at].req_id] = torch.cat(padded)


def num_reserved(order: Compaction, num_sinks: int, block_size: int) -> int:
    """Entries of every kv_head that a compaction must keep: sinks and protected ones."""
    return num_covered([(0, num_sinks), *order.protected], order.tail * block_size)
