# SPDX-License-Identifier: Apache-2.0
"""A worker's record of what it holds of every request, against which orders are checked.

The scheduler decides; but a worker that cannot follow must not read on, because the columns that
the scheduler believes compressed belong to other requests by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ems_vllm.engine.orders import Compaction, RecordedQueries, ScoredChunk, StepOrders


class StepRefused(RuntimeError):
    """A worker was told to do what it cannot: scheduler and worker disagree."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(
            f"KV-cache compression: {what}: the scheduler expects {expected}, this worker has "
            f"{found}; the step is refused, because it would read another request's cache."
        )


@dataclass
class WorkerRequest:
    """What a worker holds of one request.

    Attributes:
        first_columns: By group, the first live column; 0 where it is not named.
        scored_until: By group, the position up to which prompt queries have scored.
        recorded_until: The position up to which queries are in its ring row.
        ring_row: That row; -1 before anything was recorded.
    """

    first_columns: dict[int, int] = field(default_factory=dict)
    scored_until: dict[int, int] = field(default_factory=dict)
    recorded_until: int = -1
    ring_row: int = -1


class WorkerRequests:
    """All requests of a worker that hold blocks."""

    def __init__(self) -> None:
        self._requests: dict[str, WorkerRequest] = {}
        self._row_owners: dict[int, str] = {}
        self._last_step: int | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def begin_step(self, orders: StepOrders | None) -> StepOrders:
        """Follow who came and went.

        Raises:
            StepRefused: there are no orders, or steps are missing, or come twice.
        """
        if orders is None:
            raise StepRefused("a step came", "every step to have its orders", "a step without")
        last = self._last_step
        if last is not None and orders.step != last + 1:
            raise StepRefused("steps do not follow each other", orders.step - 1, last)
        self._last_step = orders.step
        for req_id in orders.ended:
            ended = self._requests.pop(req_id, None)
            if ended is None:
                raise StepRefused(f"request {req_id} ended", "it to be here", "no such request")
            self._give_back_row(ended)
        for req_id in orders.admitted:
            if req_id in self._requests:
                raise StepRefused(f"request {req_id} begins", "it to be new", "it already")
            self._requests[req_id] = WorkerRequest()
        return orders

    def compact(self, orders: Sequence[Compaction]) -> None:
        """Take note of compactions that are about to be done.

        Raises:
            StepRefused: what is to be compressed is not what is here.
        """
        for order in orders:
            self._compact(order)
        for order in orders:
            # What was recorded is not needed any more.
            self._give_back_row(self._request(order.req_id))

    def _compact(self, order: Compaction) -> None:
        request = self._request(order.req_id)
        what = f"request {order.req_id}, group {order.group_id}, is to be compressed"
        found: object = request.first_columns.get(order.group_id, 0)
        if found != order.first_before:
            raise StepRefused(what, f"first column {order.first_before}", f"first column {found}")
        if order.ring_row >= 0:
            found = (request.ring_row, request.recorded_until)
            expected = (order.ring_row, order.num_computed)
            if found != expected:
                raise StepRefused(f"{what} by its queries (row, end)", expected, found)
        if order.num_scored and not order.num_represented:
            found = request.scored_until.get(order.group_id)
            if found != order.num_computed:
                raise StepRefused(f"{what} by its prompt's queries", order.num_computed, found)
        request.first_columns[order.group_id] = order.first

    def check_first_columns(self, req_ids: Iterable[str], orders: StepOrders) -> None:
        """Whether every scheduled request is compressed exactly as far as it must be.

        Args:
            req_ids: In the order of `orders.starts`.
            orders: Of the step, whose compactions have been done.
        Raises:
            StepRefused: one is not.
        """
        requests = [self._request(req_id) for req_id in req_ids]
        for group_id, columns in orders.first_columns.items():
            found = [request.first_columns.get(group_id, 0) for request in requests]
            if found != columns:
                self._refuse_first_columns(req_ids, group_id, columns, found)

    @staticmethod
    def _refuse_first_columns(
        req_ids: Iterable[str], group_id: int, expected: list[int], found: list[int]
    ) -> None:
        if len(expected) != len(found):
            raise StepRefused(
                f"group {group_id}", f"{len(expected)} requests", f"{len(found)} requests"
            )
        for req_id, should, has in zip(req_ids, expected, found, strict=True):
            if should != has:
                what = f"request {req_id}, group {group_id}, is attended to"
                raise StepRefused(what, f"first column {should}", f"first column {has}")

    def scored(self, order: ScoredChunk) -> None:
        """Take note of prompt queries that are about to score.

        Raises:
            StepRefused: queries before them should have scored, and did not.
        """
        request = self._request(order.req_id)
        if order.num_accumulated > 0:
            found = request.scored_until.get(order.group_id)
            if found != order.first_query:
                what = f"request {order.req_id}, group {order.group_id}, is to score its prompt"
                raise StepRefused(what, f"queries up to {order.first_query}", found)
        request.scored_until[order.group_id] = order.seq_len

    def recorded(self, order: RecordedQueries, end: int) -> None:
        """Take note of queries that are about to be recorded, up to position `end`.

        Raises:
            StepRefused: the row belongs to another request.
        """
        owner = self._row_owners.get(order.ring_row)
        if owner not in (None, order.req_id):
            what = f"request {order.req_id} is to record queries in row {order.ring_row}"
            raise StepRefused(what, "a free row", f"the row of request {owner}")
        request = self._request(order.req_id)
        if request.ring_row != order.ring_row:
            self._give_back_row(request)
            request.ring_row = order.ring_row
            self._row_owners[order.ring_row] = order.req_id
        request.recorded_until = end

    def _request(self, req_id: str) -> WorkerRequest:
        try:
            return self._requests[req_id]
        except KeyError:
            raise StepRefused(f"request {req_id}", "it to be here", "no such request") from None

    def _give_back_row(self, request: WorkerRequest) -> None:
        if request.ring_row >= 0:
            del self._row_owners[request.ring_row]
            request.ring_row = -1
