# SPDX-License-Identifier: Apache-2.0
"""Which pages of its compressed columns each kv_head of a request owns, on host and device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm.engine.group.to_device import to_device
from ems_vllm.engine.pools import Pool

if TYPE_CHECKING:
    from ems_vllm.engine.orders import Compaction
    from ems_vllm.head_shares import HeadShares


class HeadTables:
    """The heads of one group's requests.

    Every request that was compressed has a place; place 0 is that of all others, whose heads own
    nothing but their slots.

    Args:
        num_layers: Of the group.
        num_heads: kv_heads of a layer.
        max_num_seqs: Most requests that hold blocks at a time.
        device: Of the tables.
        shares: Of each layer, whatever the prompt; None where compactions deal by scores.

    Attributes:
        page_starts: [num_layers, max_num_seqs + 1, num_heads + 1], int32 - see ops.head_pages.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        max_num_seqs: int,
        device: torch.device,
        shares: Sequence[HeadShares] | None = None,
    ) -> None:
        self._shares = shares
        self._num_heads = num_heads
        self._places: dict[str, int] = {}
        self._free = Pool(1, max_num_seqs)
        num_places = max_num_seqs + 1
        shape = (num_layers, num_places)
        self.page_starts = torch.zeros((*shape, num_heads + 1), dtype=torch.int32, device=device)
        self._owned = np.zeros((*shape, num_heads), np.int64)
        # By place: what the longest head of any layer owns beyond an equal share.
        self._most_beyond = np.zeros(num_places, np.int64)

    @property
    def num_heads(self) -> int:
        return self._num_heads

    @property
    def num_owners(self) -> int:
        """Requests whose heads own pages."""
        return len(self._places)

    def owned(self, req_ids: Sequence[str]) -> np.ndarray:
        """[num_layers, num_requests, num_heads]: pages that are owned, 0 before a compaction."""
        return self._owned[:, self.places(req_ids)]

    def deal(
        self, orders: Sequence[Compaction], least_pages: Sequence[int] | None = None
    ) -> np.ndarray | None:
        """[num_layers, num_orders, num_heads]: pages that will be owned after compactions.

        None where that depends on scores.

        Args:
            least_pages: By order, pages that any head needs for what it must keep; None for 1.
        """
        if self._shares is None:
            return None
        least_pages = [1] * len(orders) if least_pages is None else least_pages
        dealt = [
            [
                of_layer.pages(order.tail - order.first, order.prompt_blocks, least)
                for order, least in zip(orders, least_pages, strict=True)
            ]
            for of_layer in self._shares
        ]
        return np.asarray(dealt, np.int64)

    def own(self, req_ids: Sequence[str], pages: np.ndarray) -> None:
        """Requests were compressed; from now on their heads own these pages.

        Args:
            pages: [num_layers, num_requests, num_heads], as many for a request in all layers.
        """
        for req_id in req_ids:
            if req_id not in self._places:
                places = self._free.take(1)
                assert places is not None, "more requests hold blocks than run at a time"
                (self._places[req_id],) = places
        places_of = self.places(req_ids)
        self._owned[:, places_of] = pages
        mean = pages[0].sum(-1) // self._num_heads
        self._most_beyond[places_of] = pages.max((0, 2)) - mean
        starts = np.zeros((*pages.shape[:2], self._num_heads + 1), np.int64)
        starts[..., 1:] = pages.cumsum(-1)
        device = self.page_starts.device
        at = to_device(places_of, device, torch.int64)
        self.page_starts[:, at] = to_device(starts, device)

    def release(self, req_ids: Iterable[str]) -> None:
        """Requests gave their blocks back."""
        for req_id in req_ids:
            place = self._places.pop(req_id, None)
            if place is not None:
                self._free.give_back([place])

    def places(self, req_ids: Iterable[str]) -> np.ndarray:
        """[num_requests], int64: places of requests."""
        return np.fromiter((self._places.get(req_id, 0) for req_id in req_ids), np.int64)

    def most_beyond(self, places: np.ndarray) -> np.ndarray:
        """[num_requests]: pages of the longest head of any layer beyond an equal share."""
        return self._most_beyond[places]


def page_start_bytes(max_num_seqs: int, num_heads: int) -> int:
    """What HeadTables hold on the device for each layer."""
    return 4 * (max_num_seqs + 1) * (num_heads + 1)
