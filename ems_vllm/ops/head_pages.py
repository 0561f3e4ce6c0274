# SPDX-License-Identifier: Apache-2.0
"""Reference of head_pages."""

import torch


def head_pages(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    places: torch.Tensor,
    page_starts: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """See ems_vllm.ops.head_pages."""
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
