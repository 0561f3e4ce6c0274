# SPDX-License-Identifier: Apache-2.0
"""Slots of scheduled tokens, against the definition."""

import inspect

import pytest
import torch

from ems_vllm.cpu_platform.slot_mapping import compute_slot_mapping

PAD = -1


@pytest.mark.parametrize("block_size", [1, 16, 24])
@pytest.mark.parametrize("query_lens", [[1], [1, 1, 1], [70, 1, 33], [3, 0, 2]], ids=str)
def test_matches_definition(block_size: int, query_lens: list[int]) -> None:
    torch.manual_seed(0)
    num_scheduled, max_num_tokens = sum(query_lens), 128
    starts = torch.randint(0, 100, (len(query_lens),)).tolist()
    positions = torch.cat(
        [torch.arange(n) + start for start, n in zip(starts, query_lens, strict=True)]
        + [torch.zeros(4, dtype=torch.int64)]
    )
    block_table = torch.randperm(4 * 200, dtype=torch.int32).view(4, 200)
    slots = torch.full((max_num_tokens + 8,), 7)
    compute_slot_mapping(
        num_tokens=num_scheduled + 4,
        max_num_tokens=max_num_tokens,
        query_start_loc_ptr=torch.tensor([0, *query_lens]).cumsum(0).int(),
        positions_ptr=positions,
        block_table_ptr=block_table,
        block_table_stride=200,
        slot_mapping_ptr=slots,
        KV_CACHE_BLOCK_SIZE=block_size,
        TOTAL_CP_WORLD_SIZE=1,
        TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1,
        PAD_ID=PAD,
        BLOCK_SIZE=1024,
    )
    expected = [
        int(block_table[req, position // block_size]) * block_size + position % block_size
        for req, (start, n) in enumerate(zip(starts, query_lens, strict=True))
        for position in range(start, start + n)
    ]
    padding = [PAD] * (max_num_tokens - num_scheduled)
    assert slots.tolist() == expected + padding + [7] * 8


def test_parameters_are_those_of_the_kernel() -> None:
    pytest.importorskip("vllm")
    from vllm.triton_utils.dispatcher import _kernel_arg_names
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    ours = tuple(inspect.signature(compute_slot_mapping).parameters)
    assert ours == _kernel_arg_names(ComputeSlotMappingKernel.kernel)


def test_context_parallelism_is_refused() -> None:
    names = inspect.signature(compute_slot_mapping).parameters
    arguments = dict.fromkeys(names) | {"TOTAL_CP_WORLD_SIZE": 2}
    with pytest.raises(NotImplementedError, match="context parallelism"):
        compute_slot_mapping(**arguments)
