# SPDX-License-Identifier: Apache-2.0
"""Block tables by kv_head, of pages that it owns."""

import torch

from ems_vllm.ops.library import operator


@operator
def head_pages(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    places: torch.Tensor,
    page_starts: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """Give every kv_head of every request a block table of its own, of pages that it owns (ours).

    A page is the slots that one kv_head has in one block: that of kv_head h in block b has number
    b * num_kv_heads + h, its place in the view [num_blocks * num_kv_heads, 1, block_size,
    head_size] of a cache. Attention over that view takes every request and kv_head as a request
    with one kv_head.

    The pages of the first B columns of a request are dealt to its kv_heads: page j lies in column
    j // num_kv_heads, slot j % num_kv_heads, and kv_head h owns pages page_starts[h] to
    page_starts[h + 1] - 1 and fills them. Of a column from B on, every kv_head has its own slot.

    Args:
        block_table: [num_rows, num_columns], int32.
        seq_lens: [num_rows], int32 - entries of the row as columns hold them: B * block_size and
            those behind; 0 or less for a row that pads a batch, whose place is not looked at.
        places: [num_rows], int32 - row of page_starts.
        page_starts: [num_places, num_kv_heads + 1], int32 - first page of every kv_head, from 0
            on and ascending, and B * num_kv_heads, the number of pages; all 0 where none is dealt.
        block_size: tokens per block.
        out_block_table: [num_rows * num_kv_heads, num_out_columns], int32 - not the same memory as
            block_table.
        out_seq_lens: [num_rows * num_kv_heads], int32.
    Mutates:
        out_seq_lens: of row r * num_kv_heads + h, block_size for every page that kv_head h owns
            and max(0, seq_lens[r] - B * block_size) more; 0 where the row pads.
        out_block_table: the columns of these entries: pages that the kv_head owns, in order, then
            its pages of columns B, B + 1 and so on. No other column.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index is out of range, page_starts is not as above, or columns are too few, of either
            table. On a GPU lengths end with the columns of out_block_table, and what is out of
            range is not written.
    Note: no host sync and no allocation, so CUDA graphs can capture it; deterministic.
    """
    num_kv_heads = page_starts.shape[1] - 1
    for row, seq_len in enumerate(seq_lens.tolist()):
        out_rows = range(row * num_kv_heads, (row + 1) * num_kv_heads)
        if seq_len <= 0:
            for out_row in out_rows:
                out_seq_lens[out_row] = 0
            continue
        starts = page_starts[int(places[row])].tolist()
        num_dealt = starts[-1] // num_kv_heads
        tail_len = max(0, seq_len - num_dealt * block_size)
        num_columns = num_dealt + -(-tail_len // block_size)
        for head, out_row in enumerate(out_rows):
            own = range(starts[head], starts[head + 1])
            pages = [(page // num_kv_heads, page % num_kv_heads) for page in own]
            pages += [(column, head) for column in range(num_dealt, num_columns)]
            for out_column, (column, slot) in enumerate(pages):
                out_block_table[out_row, out_column] = (
                    block_table[row, column] * num_kv_heads + slot
                )
            out_seq_lens[out_row] = tail_len + len(own) * block_size
