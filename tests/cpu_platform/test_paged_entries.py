# SPDX-License-Identifier: Apache-2.0
"""Entries are read from where they lie, however a cache is laid out."""

import pytest
import torch

pytest.importorskip("vllm")

from ems_vllm.cpu_platform.paged_entries import PagedEntries

NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, WIDTH = 7, 3, 4, 10


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def half(whole: torch.Tensor) -> torch.Tensor:
    """Of a tensor with room for two caches, the one that does not begin it."""
    return whole[1]


LAYOUTS = {
    "heads before slots": numbered(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, WIDTH),
    "slots before heads": numbered(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, WIDTH).transpose(1, 2),
    "heads before blocks": numbered(NUM_KV_HEADS, NUM_BLOCKS, BLOCK_SIZE, WIDTH).transpose(0, 1),
    "second of two": half(numbered(2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, WIDTH)),
    "pages padded by whole rows": numbered(NUM_BLOCKS, NUM_KV_HEADS + 1, BLOCK_SIZE, WIDTH)[:, 1:],
    "pages padded by a part of a row": numbered(NUM_BLOCKS, NUM_KV_HEADS * BLOCK_SIZE * WIDTH + 3)[
        :, :-3
    ].unflatten(1, (NUM_KV_HEADS, BLOCK_SIZE, WIDTH)),
    "as bytes": numbered(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, WIDTH).to(torch.uint8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_is_what_lies_there(layout):
    block_ids = torch.tensor([[6, 6, 0, 3, 3], [1, 5, 5, 5, 2]])
    block_offsets = torch.tensor([[0, 3, 2, 1, 1], [3, 0, 1, 2, 3]])
    entries = PagedEntries(block_ids, block_offsets)
    assert entries.shape == (2, 5)
    cache = LAYOUTS[layout]
    # As layers with a cache each do, of which some may be laid out otherwise.
    for read in (cache, cache.flip(0), cache.contiguous(), cache.mT.contiguous().mT):
        expected = read[block_ids, :, block_offsets].transpose(1, 2)
        assert torch.equal(entries.copy_from(read), expected)
