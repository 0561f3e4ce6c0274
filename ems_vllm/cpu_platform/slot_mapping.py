# SPDX-License-Identifier: Apache-2.0
"""PyTorch twin of the one Triton kernel that vLLM's V1 model runner needs for plain decoding."""

import torch


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    slot_mapping_ptr: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    """Map each scheduled token to the slot its K/V is written to.

    Parameter names are those of `ComputeSlotMappingKernel.kernel` in vllm.v1.worker.block_table,
    because vLLM then passes them by name.

    Args:
        num_tokens: Tokens in the batch; may exceed the scheduled ones by padding.
        max_num_tokens: Length of the slot mapping; whatever is not scheduled becomes PAD_ID.
        query_start_loc_ptr: [num_reqs + 1], int32.
        positions_ptr: [num_tokens], int64.
        block_table_ptr: [max_num_reqs, max_num_blocks_per_req], int32.
        slot_mapping_ptr: [max_num_tokens], int64; written.
    Raises:
        NotImplementedError: with context parallelism.
    """
    if TOTAL_CP_WORLD_SIZE != 1:
        raise NotImplementedError("this CPU platform has no context parallelism")
    query_lens = query_start_loc_ptr.diff()
    num_scheduled = int(query_start_loc_ptr[-1])
    req_idx = torch.repeat_interleave(query_lens, output_size=num_scheduled)
    positions = positions_ptr[:num_scheduled]
    block_ids = block_table_ptr[req_idx, positions // KV_CACHE_BLOCK_SIZE].to(torch.int64)
    slots = slot_mapping_ptr[:max_num_tokens]
    slots[:num_scheduled] = block_ids * KV_CACHE_BLOCK_SIZE + positions % KV_CACHE_BLOCK_SIZE
    slots[num_scheduled:] = PAD_ID
