# SPDX-License-Identifier: Apache-2.0
"""Vectors of entries, out of a cache of either layout."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ems_vllm.policies.parts import Part, gather

BLOCKS = torch.tensor([[7, 2, 5], [1, 7, 0]], dtype=torch.int32)


def key_cache(num_blocks, *, side_by_side, dtype):
    """[2, num_blocks, 3, 4, 8]: the half of a cache that holds keys."""
    shape = (2, num_blocks, 3, 4, 16) if side_by_side else (2, num_blocks, 6, 4, 8)
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return cache.chunk(2, dim=4 if side_by_side else 2)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("side_by_side", [True, False])
def test_blocks_follow_one_another_for_each_kv_head(side_by_side, dtype):
    cache = key_cache(9, side_by_side=side_by_side, dtype=dtype)
    gathered = gather(cache, BLOCKS)
    assert gathered.shape == (2, 2, 3, 12, 8)
    assert gathered.is_contiguous()
    for row, blocks in enumerate(BLOCKS.tolist()):
        expected = torch.cat([cache[:, block].float() for block in blocks], dim=2)
        assert torch.equal(gathered[:, row], expected)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_only_what_is_gathered_is_copied(side_by_side):
    cache = key_cache(2000, side_by_side=side_by_side, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gathered = gather(cache, BLOCKS)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiled.events())
    assert gathered.nbytes <= allocated < 3 * gathered.nbytes < cache.nbytes


@pytest.mark.parametrize(("num_slices", "num_made"), [(1, 1), (3, 6)])
def test_what_there_is_room_for_is_made_once(num_slices, num_made):
    made = []

    def vectors_of(entries):
        made.append(entries)
        return torch.full((1, 1, 1, 8, 4), float(entries.start))

    slices = [slice(8 * index, 8 * index + 8) for index in range(num_slices)]
    part = Part(slice(0, 1), slice(0, 1), slices, vectors_of)
    more = part.made_into(lambda entries, vectors: vectors.add_(entries.stop))
    for _ in range(2):
        for at, (entries, vectors) in zip(slices, more, strict=True):
            assert entries == at
            assert (vectors == at.start + at.stop).all()
    assert len(made) == num_made
