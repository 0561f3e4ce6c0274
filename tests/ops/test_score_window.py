# SPDX-License-Identifier: Apache-2.0
"""score_window against its reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from compare import assert_bitwise, assert_close
from generators import LAYOUTS, PagedCache, int_tensor, paged_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops

WINDOW = 8


@dataclass
class Case:
    ring: torch.Tensor
    ring_rows: list[int]
    num_queries: list[int]
    end_positions: list[int]
    cache: PagedCache
    live_lens: list[int]
    num_entries: list[int]
    scale: float
    max_entries: int
    key_scales: torch.Tensor | None = None
    peaks_length: int | None = None

    def args(self) -> tuple:
        num_layers, _, num_kv_heads = self.cache.key.shape[:3]
        shape = (num_layers, len(self.live_lens), num_kv_heads, self.max_entries)
        return (
            self.ring,
            int_tensor(self.ring_rows),
            int_tensor(self.num_queries),
            int_tensor(self.end_positions),
            self.cache.key,
            self.cache.block_table,
            int_tensor(self.live_lens),
            int_tensor(self.num_entries),
            self.scale,
            torch.full(shape, float("nan")),
            self.key_scales,
            torch.full((*shape[:3], self.peaks_length or self.max_entries), float("nan")),
        )

    def run(self, score_window) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and peaks."""
        args = self.args()
        score_window(*args)
        return args[-3], args[-1]


def make_case(
    rows: list[tuple[int, int, int]],
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    group: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "separate",
) -> Case:
    """Rows (live_len, num_queries, num_entries); ring places that no query fills are NaN."""
    live_lens, num_queries, num_entries = map(list, zip(*rows, strict=True))
    cache = paged_cache(
        live_lens,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        dtype=dtype,
        layout=layout,
    )
    # Positions run ahead of the live entries, as they do after an earlier compaction.
    end_positions = [live_len + 37 * row for row, live_len in enumerate(live_lens)]
    end_positions = [max(end, n) for end, n in zip(end_positions, num_queries, strict=True)]
    num_ring_rows = len(rows) + 2
    # Not row 0, for what scattered_table says of block 0.
    ring_rows = (torch.randperm(num_ring_rows - 1)[: len(rows)] + 1).tolist()
    shape = (num_layers, num_ring_rows, WINDOW, group * num_kv_heads, head_size)
    ring = torch.full(shape, float("nan"), dtype=dtype)
    for ring_row, end, count in zip(ring_rows, end_positions, num_queries, strict=True):
        for age in range(count):
            query = torch.randn(num_layers, *shape[3:])
            ring[:, ring_row, (end - 1 - age) % WINDOW] = query.to(dtype)
    return Case(
        ring=ring,
        ring_rows=ring_rows,
        num_queries=num_queries,
        end_positions=end_positions,
        cache=cache,
        live_lens=live_lens,
        num_entries=num_entries,
        scale=head_size**-0.5,
        max_entries=max(num_entries) + 3,
    )


def check(case: Case) -> None:
    for found, expected in zip(
        case.run(ops.score_window), case.run(ops.score_window.reference), strict=True
    ):
        assert_close(found, expected, "scores")


LENGTHS = [1, 15, 16, 17, 63, 129, 1000]
ROWS = [(129, 8, 100), (63, 3, 63), (0, 0, 0), (17, 8, 0), (5, 8, 5), (300, 0, 250)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout(dtype, layout):
    check(make_case(ROWS, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_float8_cache(head_size, dtype, layout):
    case = make_case(ROWS, head_size=head_size, dtype=dtype, layout=layout)
    scales = torch.linspace(0.5, 2.0, case.cache.key.shape[0])
    check(replace(case, cache=case.cache.to_float8(), key_scales=scales))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_heads(group, head_size):
    check(make_case(ROWS, group=group, head_size=head_size, dtype=torch.float16))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, block_size):
    check(make_case([(length, 8, max(length - 8, 1))], block_size=block_size))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_batch(data):
    row = st.integers(0, 150).flatmap(
        lambda live: st.tuples(st.just(live), st.integers(0, WINDOW), st.integers(0, live))
    )
    check(make_case(data.draw(st.lists(row, min_size=1, max_size=4)), head_size=64, block_size=8))


def test_a_query_pays_one_unit_of_attention():
    scores, _ = make_case([(129, 5, 129)], group=4).run(ops.score_window)
    total = scores.sum(dim=-1)
    assert_close(total, torch.full_like(total, 5.0), "scores")


def test_of_a_single_query_the_peak_is_the_score():
    scores, peaks = make_case([(129, 1, 129)], group=1).run(ops.score_window)
    assert_close(peaks, scores, "scores")


def test_scores_are_the_same_without_peaks():
    case = make_case(ROWS, dtype=torch.bfloat16)
    args = case.args()
    ops.score_window(*args[:-1])
    assert_bitwise(args[-3], case.run(ops.score_window)[0])


@pytest.mark.cpu_only
def test_result_does_not_depend_on_the_number_of_threads():
    case = make_case(ROWS, dtype=torch.bfloat16)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run(ops.score_window)
        torch.set_num_threads(3)
        for found, first in zip(case.run(ops.score_window), expected, strict=True):
            assert_bitwise(found, first)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.cpu_only
def test_opcheck():
    args = list(make_case([(20, 5, 15)], head_size=64, block_size=8).args())
    args = [arg.nan_to_num() if isinstance(arg, torch.Tensor) else arg for arg in args]
    torch.library.opcheck(torch.ops.ems_vllm.score_window.default, tuple(args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_queries": [9]}, r"score_window: num_queries\[0\] must be in 0\.\.8, got 9"),
        ({"end_positions": [3]}, r"num_queries\[0\] must be in 0\.\.3, got 8"),
        ({"live_lens": [65]}, r"live_lens\[0\] must be in 0\.\.64, got 65"),
        ({"num_entries": [41], "max_entries": 60}, r"num_entries\[0\] must be in 0\.\.40, got 41"),
        ({"max_entries": 20}, r"num_entries\[0\] must be in 0\.\.20, got 30"),
        ({"peaks_length": 20}, r"peaks must be as long as scores \(33\), got 20"),
        ({"scale": -0.5}, r"scale must be at least 0, got -0\.5"),
        ({"ring_rows": [3]}, r"ring_rows\[0\] must be in 0\.\.2, got 3"),
        ({"ring_rows": [0, 1]}, r"ring_rows must have shape \[1\], got \[2\]"),
        ({"ring": torch.zeros(1, 3, 8, 4, 64)}, r"key_cache must have shape \[1, \*, \*, \*, 64\]"),
        ({"ring": torch.zeros(2, 3, 8, 3, 64)}, r"must be a multiple of .* \(2\), got 3"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(change, message):
    with pytest.raises(RuntimeError, match=message):
        replace(make_case([(40, 8, 30)]), **change).run(ops.score_window)
