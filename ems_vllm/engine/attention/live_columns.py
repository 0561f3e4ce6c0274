# SPDX-License-Identifier: Apache-2.0
"""Attention metadata in which every request begins at its first live column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ems_vllm import ops
from ems_vllm.engine.group.to_device import to_device

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


class LiveColumns:
    """Block tables and lengths of the batch in one group, without the columns that were freed.

    Args:
        block_size: Tokens per block.
        max_num_reqs: Rows of the largest batch, CUDA-graph padding included.
        max_num_columns: Width of vLLM's block tables.
        device: Of the cache.

    Attributes:
        block_table: [max_num_reqs, max_num_columns], int32.
        seq_lens: [max_num_reqs], int32 - live entries.
    """

    def __init__(
        self, block_size: int, max_num_reqs: int, max_num_columns: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        # CUDA graphs capture the addresses of these; they never move.
        self.block_table = torch.zeros(
            (max_num_reqs, max_num_columns), dtype=torch.int32, device=device
        )
        self.seq_lens = torch.zeros((max_num_reqs,), dtype=torch.int32, device=device)

    def skip_freed(
        self, metadata: CommonAttentionMetadata, first_columns: np.ndarray, max_seq_len: int | None
    ) -> CommonAttentionMetadata:
        """Metadata in which every request begins at its first live column.

        Args:
            metadata: vLLM's, for the whole batch.
            first_columns: [at most num_reqs] - of the leading rows; the remaining ones are padding.
            max_seq_len: Longest rewritten sequence, or None to keep vLLM's.
        """
        num_reqs = metadata.num_reqs
        block_table = self.block_table[:num_reqs, : metadata.block_table_tensor.shape[1]]
        seq_lens = self.seq_lens[:num_reqs]
        padded = np.zeros(num_reqs, np.int32)
        padded[: len(first_columns)] = first_columns
        ops.shift_block_tables(
            metadata.block_table_tensor,
            metadata.seq_lens,
            to_device(padded, self.block_table.device),
            self._block_size,
            block_table,
            seq_lens,
        )
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound = upper_bound - torch.from_numpy(padded) * self._block_size
        # Image tokens that see each other are counted from the first live column too; where there
        # is one, they have been compressed.
        images = metadata.mm_req_doc_ranges or {}
        return metadata.replace(
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            max_seq_len=metadata.max_seq_len if max_seq_len is None else max_seq_len,
            seq_lens_cpu_upper_bound=upper_bound,
            _num_computed_tokens_cache=None,
            mm_req_doc_ranges={row: spans for row, spans in images.items() if not padded[row]}
            or None,
        )
