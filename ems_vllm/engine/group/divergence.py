# SPDX-License-Identifier: Apache-2.0
"""By how much a compaction changes what attention gives out, to the queries that were recorded.

Of a request that is measured. Its recorded queries, the newest, see every entry that is compressed,
before the compaction and after it, and of the tail what came before them; so nothing but the
compaction is different. They attend twice, and what comes of it is compared by layer:

    |after - before| / |before|     over all heads of a layer together, in the mean of the queries

Entries are read a slice at a time, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.window_attention import WindowAttention, window_attention

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext
    from ems_vllm.policies.reading import Part

# Beyond it nothing is said by how much, nor where an output is no number.
_LARGEST_ERROR = 10.0
# Below any logarithm of a sum of attention that is not -inf.
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class _Run:
    """Consecutive entries of each row.

    Attributes:
        context: Says where they lie.
        first, length: [num_rows], int32 - of each row.
        longest: The largest length, on the host.
        is_tail: Whether a query sees only those before it.
    """

    context: CompactionContext
    first: Tensor
    length: Tensor
    longest: int
    is_tail: bool = False


class Divergence:
    """Collects what compactions of measured requests changed, of one group."""

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}

    @contextmanager
    def around(self, context: CompactionContext, req_id: str, num_tail: int) -> Iterator[None]:
        """Around what writes the kept entries of one request, in some layers.

        Args:
            context: Of the request alone, its rows with the columns that they are written to.
            req_id: The request.
            num_tail: Its live tokens behind the entries.
        """
        tail = _Run(
            context,
            context.num_entries,
            context.num_live - context.num_entries,
            num_tail,
            is_tail=True,
        )
        entries = _Run(
            context,
            torch.zeros_like(context.num_entries),
            context.num_entries,
            context.max_entries,
        )
        before = [_output(window, (entries, tail)) for window in _windows(context)]
        yield
        written_to = context.target_columns * context.block_size
        kept = _Run(
            # Kv_heads that are rows have columns behind their live ones to write to.
            replace(context, num_live=written_to + context.budgets),
            written_to,
            context.budgets,
            context.max_budget,
        )
        self._found.setdefault(req_id, []).append(_errors(context, before, (kept, tail)))

    def take(self) -> dict[str, Tensor]:
        """By request, [num_layers], float32, on the device: relative errors since the call before.

        Layers are all of the group, in any order.
        """
        found, self._found = self._found, {}
        return {req_id: torch.cat(errors) for req_id, errors in found.items()}


def _windows(context: CompactionContext) -> Iterator[WindowAttention]:
    """Recorded queries, some layers and rows at a time; the same ones whenever it is asked."""
    assert context.query_ring is not None
    _, _, window, num_heads, head_size = context.query_ring.shape
    # Keys are counted for already; values, and outputs of a few kinds.
    of_entry = 3 * context.num_kv_heads * head_size
    of_row = 4 * window * num_heads * head_size
    return window_attention(context, floats_per_entry=of_entry, floats_per_row=of_row)


def _output(window: WindowAttention, runs: Sequence[_Run]) -> Tensor:
    """[layers, rows, num_kv_heads, group, obs_window, head_size], float32: over all runs at once.

    By as many softmaxes as there are slices, each weighted with its share of the exponentials.
    """
    total = window.queries.new_full((*window.queries.shape[:-1], 1), -torch.inf)
    output = torch.zeros_like(window.queries)
    for run in runs:
        part = replace(window.part, context=run.context)
        for at in part.steps(slice(0, run.longest)):
            logits = _logits(window, part, run, at)
            of_slice = logits.logsumexp(-1, keepdim=True)
            both = torch.logaddexp(total, of_slice)
            # A query may see nothing yet: -inf less -inf is no number.
            weight = both.clamp(min=_LOWEST)
            values = part.values(at, run.first)[:, :, :, None]
            output.mul_((total - weight).exp_())
            output.add_(logits.sub_(weight).exp_() @ values)
            total = both
    return output


def _logits(window: WindowAttention, part: Part, run: _Run, at: slice) -> Tensor:
    """[layers, rows, num_kv_heads, group, obs_window, entries]; -inf of what is not seen."""
    keys = part.keys(at, run.first)[:, :, :, None]
    logits = (window.queries @ keys.transpose(-1, -2)).mul_(part.context.scale)
    seen = run.length[part.rows, None].expand(-1, window.ages.shape[1])
    if run.is_tail:
        seen = seen - window.ages
    entry = torch.arange(at.start, at.stop, device=logits.device)
    is_hidden = entry >= seen[..., None]
    return logits.masked_fill_(is_hidden[None, :, None, None], -torch.inf)


def _errors(context: CompactionContext, before: Sequence[Tensor], runs: Sequence[_Run]) -> Tensor:
    """[num_layers], float32: relative errors, of all rows of a layer together."""
    assert context.query_ring is not None
    shape = (2, context.num_layers, context.query_ring.shape[2])
    # Squared norms: of the differences, and of the outputs before.
    squares = torch.zeros(shape, device=context.device)
    is_recorded = None
    for window, expected in zip(_windows(context), before, strict=True):
        change = _output(window, runs).sub_(expected)
        for of_all, of_part in zip(squares, (change, expected), strict=True):
            of_all[window.part.layers] += of_part.square().sum((1, 2, 3, 5))
        # Rows are of one request.
        is_recorded = window.is_recorded[0]
    assert is_recorded is not None
    changed, expected = squares.sqrt()
    errors = changed / expected.clamp(min=torch.finfo(torch.float32).tiny)
    errors = errors.nan_to_num(nan=_LARGEST_ERROR).clamp(max=_LARGEST_ERROR)
    errors = errors.masked_fill(~is_recorded, 0.0)
    return errors.sum(-1) / is_recorded.sum().clamp(min=1)


def reference_bytes(num_layers: int, obs_window: int, num_heads: int, head_size: int) -> int:
    """What is held of a request while it is compacted, beside slices of its entries.

    Args:
        num_layers: That are compacted at a time.
        num_heads: Query heads of a layer.
    """
    return num_layers * obs_window * num_heads * head_size * 4
