# SPDX-License-Identifier: Apache-2.0
"""Keeps account of what compactions did, for the frontend: by request, and in all.

Booked when the output of a step that compacted has come, since only then it surely has, and a
coverage has said how much it kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ems_vllm.engine.holding import Holding, attach_holding
from ems_vllm.engine.scheduler.dense_pool import DensePool
from ems_vllm.engine.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.engine import EngineCoreOutput

    from ems_vllm.engine.orders import Compaction
    from ems_vllm.engine.report import Measured
    from ems_vllm.engine.scheduler.guard import Guard
    from ems_vllm.engine.totals import Outcome


ContentsOf: TypeAlias = Callable[[str, int, int, int], Sequence[Hashable]]


@dataclass(frozen=True)
class Pool:
    """The blocks of an engine.

    Attributes:
        num_blocks: That requests may have.
        block_bytes: Of one, on all devices of the engine.
    """

    num_blocks: int
    block_bytes: int


@dataclass
class _Account:
    """Of one request.

    Attributes:
        otherwise: Its outcome, if it is not compressed.
        since: Step with which it was last admitted; None while it waits.
        first_columns: By compressed group, its first live column.
    """

    otherwise: Outcome
    since: int | None = None
    first_columns: dict[int, int] = field(default_factory=dict)
    num_compactions: int = 0
    num_entries_in: float = 0.0
    num_entries_kept: float = 0.0

    @property
    def outcome(self) -> Outcome:
        return "compressed" if self.num_compactions else self.otherwise


class Accounts:
    """Of the requests of one scheduler.

    Args:
        block_sizes: Tokens per block of the compressed groups, by their index.
        pool: The blocks.
        contents_of: Of a request's columns in a group, from one on and before another, what tells
            them from columns of other content.
        guard: Judges what compactions change; None for nobody.
    """

    def __init__(
        self,
        block_sizes: Mapping[int, int],
        pool: Pool,
        contents_of: ContentsOf,
        guard: Guard | None = None,
    ) -> None:
        self._block_sizes = block_sizes
        self._pool = pool
        self._contents_of = contents_of
        self._guard = guard
        self._accounts: dict[str, _Account] = {}
        self._dense_pool = DensePool()
        self._totals = self._no_totals()
        self._has_changed = False
        # What the frontend does not know yet; outlives the account of a request that has ended.
        self._news: dict[str, Holding] = {}

    def admitted(self, req_id: str, step: int, otherwise: Outcome) -> None:
        """A request begins, or begins again, with a step.

        Args:
            otherwise: Its outcome, if it is not compressed.
        """
        account = self._accounts.setdefault(req_id, _Account(otherwise))
        account.since, account.otherwise = step, otherwise
        self._tell_of(req_id, account)

    def released(self, req_id: str, has_ended: bool) -> None:
        """A request gave its blocks back: it has ended, or was preempted."""
        account = self._accounts.get(req_id)
        if account is None:
            return
        self._dense_pool.released(req_id)
        self._has_changed = True
        account.first_columns.clear()
        account.since = None
        if has_ended:
            ended = self._totals.num_ended
            ended[account.outcome] = ended.get(account.outcome, 0) + 1
            del self._accounts[req_id]
            if self._guard is not None:
                self._guard.ended(req_id)

    def compacted(
        self, step: int, orders: Sequence[Compaction], first_columns: Iterable[int]
    ) -> None:
        """The output of a step has come.

        Args:
            step: Its number.
            orders: Its compactions.
            first_columns: For each, the first column that is live afterwards.
        """
        touched: dict[str, _Account] = {}
        for order, first in zip(orders, first_columns, strict=True):
            account = self._accounts.get(order.req_id)
            # Ended or preempted meanwhile: what it held is gone.
            if account is None or account.since is None or account.since > step:
                continue
            touched[order.req_id] = account
            self._book(account, order, first)
        for req_id, account in touched.items():
            account.num_compactions += 1
            self._tell_of(req_id, account)
        self._totals.num_compactions += len(touched)
        self._has_changed = self._has_changed or bool(touched)

    def _book(self, account: _Account, order: Compaction, first: int) -> None:
        before = account.first_columns.get(order.group_id, 0)
        account.first_columns[order.group_id] = first
        of_all = self._block_sizes[order.group_id] / len(self._block_sizes)
        entries_in, entries_kept = (order.tail - before) * of_all, (order.tail - first) * of_all
        account.num_entries_in += entries_in
        account.num_entries_kept += entries_kept
        self._totals.num_entries_in += entries_in
        self._totals.num_entries_kept += entries_kept
        self._totals.num_blocks_freed += first - before
        contents = self._contents_of(order.req_id, order.group_id, before, first)
        num_saved = self._dense_pool.lost(order.req_id, order.group_id, contents, first - before)
        self._totals.num_bytes_freed += num_saved * self._pool.block_bytes

    def measured(self, measured: Measured) -> None:
        """A worker reports what compactions took and merged."""
        totals = self._totals
        totals.compaction_seconds += measured.seconds
        totals.num_entries_merged += measured.num_entries_merged
        totals.num_entries_evicted += measured.num_entries_evicted
        if self._guard is not None:
            self._guard.measured(measured.attention_errors)
        self._has_changed = True

    def scheduled(self, num_free: int, last_admitted_first: Iterable[tuple[str, int]]) -> None:
        """A step was scheduled.

        Args:
            num_free: Blocks of the pool that are free.
            last_admitted_first: Requests that run, and how many blocks each would hold, dense.
        """
        num_avoided = self._dense_pool.crowded_out(num_free, last_admitted_first)
        self._totals.num_preemptions_avoided += num_avoided
        self._has_changed = self._has_changed or num_avoided > 0

    def _tell_of(self, req_id: str, account: _Account) -> None:
        sizes = self._block_sizes
        gone = sum(first * sizes[group_id] for group_id, first in account.first_columns.items())
        self._news[req_id] = Holding(
            num_compactions=account.num_compactions,
            num_entries_in=account.num_entries_in,
            num_entries_kept=account.num_entries_kept,
            num_entries_gone=gone / len(sizes),
        )

    def tell(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Send what is new of requests along with the outputs of a step, of all frontends."""
        if not self._news:
            return
        for output in outputs:
            if (holding := self._news.pop(output.request_id, None)) is not None:
                attach_holding(output, holding)
        # A prompt that is still being processed has no output.
        self._news = {key: new for key, new in self._news.items() if key in self._accounts}

    def take_totals(self) -> Totals | None:
        """What there is to count since the call before; None for nothing."""
        if not self._has_changed:
            return None
        totals, self._has_changed = self._totals, False
        self._totals = self._no_totals()
        totals.num_blocks_saved = self._dense_pool.num_blocks
        totals.num_bytes_saved = self._dense_pool.num_blocks * self._pool.block_bytes
        if self._guard is not None:
            self._guard.count(totals)
        return totals

    def _no_totals(self) -> Totals:
        return Totals(num_pool_blocks=self._pool.num_blocks)
