# SPDX-License-Identifier: Apache-2.0
"""A batch with a row for each kv_head of each request, for attention over pages of one kv_head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm import ops
from ems_vllm.engine.group.to_device import to_device

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from ems_vllm.engine.group.head_tables import HeadTables


class HeadBatch:
    """Turns the metadata of a batch of requests into that of their kv_heads.

    Row r * num_heads + h is kv_head h of request r. Its tokens follow each other, as attention
    kernels expect, so where a request has several, they are put into another order.

    Lengths and tables of the rows differ by layer. They are written for each layer when it runs
    (`write`), into one place: tables for all layers would take as many times as much memory, and
    each step has to write every one of them anyway.

    Args:
        heads: What kv_heads own.
        block_size: Tokens per block.
        block_table: [max_num_reqs, max_num_columns], int32 - live columns of the batch.
        seq_lens: [max_num_reqs], int32 - live entries, as columns hold them.

    Attributes:
        num_heads: kv_heads of a layer.
    """

    def __init__(
        self,
        heads: HeadTables,
        block_size: int,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        self.num_heads = heads.num_heads
        self._heads = heads
        self._block_size = block_size
        self._live_table, self._live_lens = block_table, seq_lens
        (max_num_reqs, num_columns), device = block_table.shape, block_table.device
        num_rows = max_num_reqs * self.num_heads
        # CUDA graphs capture the addresses of these; they never move.
        self._places = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._query_starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self._block_table = torch.zeros((num_rows, num_columns), dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._num_reqs = 0
        self._num_columns = 0
        self.token_order: torch.Tensor | None = None

    def split(
        self, metadata: CommonAttentionMetadata, req_ids: Sequence[str]
    ) -> CommonAttentionMetadata:
        """Metadata of the rows; lengths and tables hold what is right once a layer has written it.

        Args:
            metadata: Of requests, in live columns.
            req_ids: Of the leading rows; the remaining ones are padding.
        """
        num_reqs, num_heads, device = metadata.num_reqs, self.num_heads, self._places.device
        self._num_reqs, self._num_columns = num_reqs, metadata.block_table_tensor.shape[1]
        places = np.zeros(num_reqs, np.int64)
        places[: len(req_ids)] = self._heads.places(req_ids)
        self._places[:num_reqs].copy_(to_device(places, device), non_blocking=True)
        starts = metadata.query_start_loc_cpu[: num_reqs + 1].numpy()
        lens = np.diff(starts)
        row_starts = np.zeros(num_reqs * num_heads + 1, np.int64)
        row_starts[1:] = np.repeat(lens, num_heads).cumsum()
        query_starts = self._query_starts[: len(row_starts)]
        query_starts.copy_(to_device(row_starts, device), non_blocking=True)
        self.token_order = None
        if metadata.max_query_len > 1:
            order = _token_order(starts, lens, num_heads)
            self.token_order = to_device(order, device, torch.int64)
        beyond = self._heads.most_beyond(places) * self._block_size
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound = upper_bound + torch.from_numpy(beyond).to(upper_bound.dtype)
            upper_bound = upper_bound.repeat_interleave(num_heads)
        is_prefilling = metadata.is_prefilling
        images = metadata.mm_req_doc_ranges
        return metadata.replace(
            query_start_loc=query_starts,
            query_start_loc_cpu=torch.from_numpy(row_starts.astype(np.int32)),
            seq_lens=self._seq_lens[: num_reqs * num_heads],
            block_table_tensor=self._block_table[: num_reqs * num_heads, : self._num_columns],
            num_reqs=num_reqs * num_heads,
            num_actual_tokens=metadata.num_actual_tokens * num_heads,
            max_seq_len=metadata.max_seq_len + int(beyond.max(initial=0)),
            seq_lens_cpu_upper_bound=upper_bound,
            is_prefilling=None
            if is_prefilling is None
            else is_prefilling.repeat_interleave(num_heads),
            mm_req_doc_ranges=images
            and {
                row * num_heads + head: spans
                for row, spans in images.items()
                for head in range(num_heads)
            },
            req_idx=None if metadata.req_idx is None else metadata.req_idx.repeat(num_heads),
        )

    def write(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and tables of the rows of the batch in a layer.

        Args:
            layer: Its index in the group.

        Returns:
            seq_lens: [num_rows], int32.
            block_table: [num_rows, num_columns], int32 - pages.
        """
        num_rows = self._num_reqs * self.num_heads
        seq_lens = self._seq_lens[:num_rows]
        block_table = self._block_table[:num_rows, : self._num_columns]
        ops.head_pages(
            self._live_table[: self._num_reqs, : self._num_columns],
            self._live_lens[: self._num_reqs],
            self._places[: self._num_reqs],
            self._heads.page_starts[layer],
            self._block_size,
            block_table,
            seq_lens,
        )
        return seq_lens, block_table


def batch_bytes(max_num_reqs: int, num_columns: int, num_heads: int) -> int:
    """What a HeadBatch holds on the device."""
    num_rows = max_num_reqs * num_heads
    # Tables, lengths and starts of rows, and places of requests.
    return 4 * (num_rows * (num_columns + 2) + 1 + max_num_reqs)


def _token_order(starts: np.ndarray, lens: np.ndarray, num_heads: int) -> np.ndarray:
    """[num_tokens * num_heads]: index of each row's tokens among pairs (token, kv_head).

    Args:
        starts: [num_reqs + 1] - first token of each request.
        lens: [num_reqs] - its tokens.
    """
    heads = np.arange(num_heads)[:, None]
    of_requests = [
        ((start + np.arange(length)) * num_heads + heads).reshape(-1)
        for start, length in zip(starts, lens, strict=False)
    ]
    return np.concatenate(of_requests)
