# SPDX-License-Identifier: Apache-2.0
"""How one batch of requests is cut into calls of scaled_dot_product_attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ems_vllm.cpu_platform.paged_entries import PagedEntries

# Bounds the K/V gathered for one call; for 8 heads of size 64 in float32 that is 256 MiB.
_MAX_GATHERED_ENTRIES = 65536


@dataclass(frozen=True)
class AttentionCall:
    """One call: requests that each have `query_len` queries and read `num_entries` entries.

    Attributes:
        tokens: Rows of the batch's query tensor, num_reqs * query_len of them.
        entries: What it reads, [num_reqs, num_entries].
        mask: Added to the logits; [num_reqs, 1, 1, num_entries] or [query_len, num_entries].
        is_causal: The mask is the plain triangle.
    """

    tokens: slice | torch.Tensor
    query_len: int
    entries: PagedEntries
    mask: torch.Tensor | None = None
    is_causal: bool = False


@dataclass(frozen=True)
class BatchShape:
    """What the cut depends on.

    Attributes:
        query_start_loc: num_reqs + 1 offsets.
        seq_lens: Entries each request has in the cache, its queries' own included.
        block_table: [num_reqs, max_num_blocks_per_req], int32.
    """

    query_start_loc: Sequence[int]
    seq_lens: Sequence[int]
    block_table: torch.Tensor
    block_size: int


def cut_into_calls(
    batch: BatchShape, sliding_window: int | None, dtype: torch.dtype
) -> list[AttentionCall]:
    """Cut a batch into calls: decodes of similar length together, every prefill on its own.

    Args:
        batch: The batch.
        sliding_window: Keys a query sees, its own included; None for all.
        dtype: Dtype of the masks, the query's.
    """
    decodes: list[int] = []
    calls: list[AttentionCall] = []
    for req_idx, seq_len in enumerate(batch.seq_lens):
        start, end = batch.query_start_loc[req_idx : req_idx + 2]
        if end - start == 1:
            decodes.append(req_idx)
        elif end > start:
            calls.append(
                _prefill(batch, req_idx, slice(start, end), seq_len, sliding_window, dtype)
            )
    for req_idxs in _similar_lengths(decodes, batch.seq_lens, sliding_window):
        calls.append(_decode(batch, req_idxs, sliding_window, dtype))
    return calls


def _prefill(
    batch: BatchShape,
    req_idx: int,
    tokens: slice,
    seq_len: int,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> AttentionCall:
    query_len = tokens.stop - tokens.start
    num_computed = seq_len - query_len
    first = max(0, num_computed + 1 - (sliding_window or seq_len))
    positions = torch.arange(first, seq_len)
    entries = _locate(batch, [req_idx], positions[None])
    if num_computed == 0 and query_len <= (sliding_window or query_len):
        return AttentionCall(tokens, query_len, entries, is_causal=True)
    mask = _causal_mask(num_computed, positions, query_len, sliding_window, dtype)
    return AttentionCall(tokens, query_len, entries, mask)


def _decode(
    batch: BatchShape, req_idxs: list[int], sliding_window: int | None, dtype: torch.dtype
) -> AttentionCall:
    seq_lens = torch.tensor([batch.seq_lens[i] for i in req_idxs])[:, None]
    first = (seq_lens - (sliding_window or seq_lens)).clamp(min=0)
    num_entries = seq_lens - first
    columns = torch.arange(int(num_entries.max()))
    positions = torch.minimum(first + columns, seq_lens - 1)
    mask = None
    if int(num_entries.min()) < len(columns):
        mask = _additive(columns < num_entries, dtype)[:, None, None]
    tokens = _rows([batch.query_start_loc[i] for i in req_idxs])
    return AttentionCall(tokens, 1, _locate(batch, req_idxs, positions), mask)


def _similar_lengths(
    req_idxs: list[int], seq_lens: Sequence[int], sliding_window: int | None
) -> Iterator[list[int]]:
    """Groups in which padding to the longest at most doubles the work."""
    group: list[int] = []
    longest = 0
    # A stable sort: requests of one length stay in batch order, which spares the gather of q.
    for req_idx in sorted(req_idxs, key=lambda i: -seq_lens[i]):
        length = min(seq_lens[req_idx], sliding_window or seq_lens[req_idx])
        too_many = (len(group) + 1) * longest > _MAX_GATHERED_ENTRIES
        if group and (2 * length < longest or too_many):
            yield sorted(group)
            group = []
        if not group:
            longest = length
        group.append(req_idx)
    if group:
        yield sorted(group)


def _rows(rows: list[int]) -> slice | torch.Tensor:
    """A slice where the rows are adjacent, so that indexing makes a view."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def _locate(batch: BatchShape, req_idxs: list[int], positions: torch.Tensor) -> PagedEntries:
    """Where the entries at positions [num_reqs, num_entries] lie.

    Entries that pad a shorter request repeat its last position: a slot that was never written could
    hold NaN, which no mask removes.
    """
    rows = batch.block_table[_rows(req_idxs)]
    block_ids = rows.gather(1, positions // batch.block_size).to(torch.int64)
    return PagedEntries(block_ids, positions % batch.block_size)


def _causal_mask(
    num_computed: int,
    positions: torch.Tensor,
    query_len: int,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    query_positions = torch.arange(num_computed, num_computed + query_len)[:, None]
    visible = positions <= query_positions
    if sliding_window:
        visible &= positions > query_positions - sliding_window
    return _additive(visible, dtype)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, else -inf; SDPA would convert a bool mask so in every layer."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
