# SPDX-License-Identifier: Apache-2.0
"""What kv_heads own, host and device, while requests are compressed and end in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.engine.group.head_tables import HeadTables, page_start_bytes
from ems_vllm.engine.orders import Compaction
from ems_vllm.head_shares import HeadShares

NUM_LAYERS, NUM_HEADS, MAX_NUM_SEQS = 2, 3, 4
SHARES = [
    HeadShares((0.5,), ((0.9,), (0.1,), (0.5,))),
    HeadShares((0.5,), ((0.3,), (0.3,), (0.9,))),
]
REQUESTS = [f"r{index}" for index in range(6)]


def tables() -> HeadTables:
    return HeadTables(len(SHARES), NUM_HEADS, MAX_NUM_SEQS, torch.device("cpu"), SHARES)


def compaction(req_id: str, columns: int, prompt_blocks: int) -> Compaction:
    return Compaction(
        req_id=req_id,
        group_id=0,
        first_before=0,
        first=prompt_blocks - columns,
        tail=prompt_blocks,
        num_computed=4 * prompt_blocks,
        block_ids=[],
        score_pages=[],
        num_scored=0,
        num_represented=0,
        ring_row=-1,
        num_queries=0,
        prompt_blocks=prompt_blocks,
    )


@st.composite
def pages_of(draw, num_requests: int) -> np.ndarray:
    """[num_layers, num_requests, num_heads]: as many for all heads together in every layer."""
    pages = np.zeros((NUM_LAYERS, num_requests, NUM_HEADS), np.int64)
    for request in range(num_requests):
        num_pages = draw(st.integers(1, 5)) * NUM_HEADS
        for layer in range(NUM_LAYERS):
            cuts = st.lists(
                st.integers(1, num_pages - 1),
                min_size=NUM_HEADS - 1,
                max_size=NUM_HEADS - 1,
                unique=True,
            )
            pages[layer, request] = np.diff([0, *sorted(draw(cuts)), num_pages])
    return pages


def check(heads: HeadTables, owned: dict[str, np.ndarray]) -> None:
    """Compare all that is asked of tables with what was last said of every request.

    Args:
        owned: By request, [num_layers, num_heads].
    """
    assert heads.num_owners == len(owned)
    places = heads.places(REQUESTS)
    nothing = np.zeros((NUM_LAYERS, NUM_HEADS), np.int64)
    expected = np.stack([owned.get(req_id, nothing) for req_id in REQUESTS], 1)
    np.testing.assert_array_equal(heads.owned(REQUESTS), expected)
    starts = heads.page_starts[:, places].numpy()
    assert not starts[..., 0].any()
    np.testing.assert_array_equal(np.diff(starts), expected)
    beyond = [of.max() - of[0].sum() // NUM_HEADS for of in expected.transpose(1, 0, 2)]
    assert heads.most_beyond(places).tolist() == beyond
    taken = [place for place in places.tolist() if place]
    assert len(set(taken)) == len(taken) == len(owned)
    assert all(0 < place <= MAX_NUM_SEQS for place in taken)
    # Of those that were not compressed, and of rows that pad.
    assert not heads.page_starts[:, 0].any()
    assert heads.most_beyond(np.zeros(1, np.int64)).tolist() == [0]


@given(st.data())
def test_host_and_device_agree_whoever_comes_and_goes(data):
    heads, owned = tables(), {}
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            free = MAX_NUM_SEQS - len(owned)
            req_ids = data.draw(st.lists(st.sampled_from(REQUESTS), min_size=1, unique=True))
            new = [req_id for req_id in req_ids if req_id not in owned][:free]
            req_ids = [req_id for req_id in req_ids if req_id in owned or req_id in new]
            if not req_ids:
                continue
            pages = data.draw(pages_of(len(req_ids)))
            heads.own(req_ids, pages)
            owned.update(zip(req_ids, pages.transpose(1, 0, 2), strict=True))
        else:
            # Of some of them nothing is owned.
            req_ids = data.draw(st.lists(st.sampled_from(REQUESTS), unique=True))
            heads.release(req_ids)
            for req_id in req_ids:
                owned.pop(req_id, None)
        check(heads, owned)
    heads.release(REQUESTS)
    check(heads, {})


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=4))
def test_pages_are_dealt_by_the_shares_of_each_layer(sizes):
    orders = [
        compaction(req_id, min(columns, prompt_blocks) or columns, prompt_blocks)
        for req_id, (columns, prompt_blocks) in zip(REQUESTS, sizes, strict=False)
    ]
    dealt = tables().deal(orders)
    assert dealt.shape == (NUM_LAYERS, len(orders), NUM_HEADS)
    for of_layer, shares in zip(dealt.tolist(), SHARES, strict=True):
        for pages, order in zip(of_layer, orders, strict=True):
            assert tuple(pages) == shares.pages(order.tail - order.first, order.prompt_blocks)
            assert sum(pages) == (order.tail - order.first) * NUM_HEADS


def test_the_device_table_never_moves():
    """CUDA graphs capture its address."""
    heads = tables()
    address = heads.page_starts.data_ptr()
    heads.own(["a"], np.full((NUM_LAYERS, 1, NUM_HEADS), 2))
    heads.release(["a"])
    heads.own(["b", "c"], np.full((NUM_LAYERS, 2, NUM_HEADS), 1))
    assert heads.page_starts.data_ptr() == address
    bytes_of_a_layer = page_start_bytes(MAX_NUM_SEQS, NUM_HEADS)
    assert heads.page_starts.nbytes == NUM_LAYERS * bytes_of_a_layer


def test_more_owners_than_requests_run_are_an_error():
    heads = tables()
    heads.own(REQUESTS[:MAX_NUM_SEQS], np.ones((NUM_LAYERS, MAX_NUM_SEQS, NUM_HEADS), np.int64))
    with pytest.raises(AssertionError, match="more requests hold blocks than run at a time"):
        heads.own(["one more"], np.ones((NUM_LAYERS, 1, NUM_HEADS), np.int64))
