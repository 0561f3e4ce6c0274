# SPDX-License-Identifier: Apache-2.0
"""score_queries against its reference, and what must hold for any attention scores."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from compare import assert_bitwise, assert_close, assert_untouched
from generators import LAYOUTS, PagedCache, int_tensor, paged_cache, rows_written, scattered_table
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops
from ems_vllm.ops.paging import gather_entries
from ems_vllm.ops.score_queries import is_sampled


@dataclass
class Case:
    query: torch.Tensor
    cache: PagedCache
    query_starts: list[int]
    query_lens: list[int]
    seq_lens: list[int]
    accumulate_lens: list[int]
    score_table: torch.Tensor
    scores: torch.Tensor
    scale: float
    lse: torch.Tensor | None = None
    sample_stride: int = 1

    def run(self, score_queries) -> torch.Tensor:
        scores = self.scores.clone()
        score_queries(
            self.query,
            self.cache.key[0],
            self.cache.block_table,
            int_tensor(self.query_starts),
            int_tensor(self.query_lens),
            int_tensor(self.seq_lens),
            int_tensor(self.accumulate_lens),
            self.score_table,
            self.lse,
            self.scale,
            self.sample_stride,
            scores,
        )
        return scores

    def written(self) -> torch.Tensor:
        num_pages, _, block_size = self.scores.shape
        return rows_written(
            self.score_table, [0] * len(self.seq_lens), self.seq_lens, num_pages, block_size
        )


def make_case(
    rows: list[tuple[int, int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "separate",
) -> Case:
    """A batch from rows (seq_len, query_len, accumulate_len); scores are NaN where overwritten."""
    seq_lens, query_lens, accumulate_lens = map(list, zip(*rows, strict=True))
    cache = paged_cache(
        seq_lens,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        dtype=dtype,
        layout=layout,
    )
    # Rows are packed with a gap of NaN before each, and heads are a slice of a wider projection.
    query_starts = [sum(query_lens[:row]) + row + 1 for row in range(len(rows))]
    num_tokens = sum(query_lens) + len(rows)
    projection = torch.randn(num_tokens, (group + 2) * num_kv_heads, head_size).to(dtype)
    projection[torch.tensor(query_starts) - 1] = float("nan")
    num_pages = len(cache.key[0]) + 3
    num_columns = [-(-length // block_size) for length in seq_lens]
    case = Case(
        query=projection[:, : group * num_kv_heads],
        cache=cache,
        query_starts=query_starts,
        query_lens=query_lens,
        seq_lens=seq_lens,
        accumulate_lens=accumulate_lens,
        score_table=scattered_table(num_columns, max(num_columns) + 2, num_pages),
        scores=torch.full((num_pages, num_kv_heads, block_size), float("nan")),
        scale=head_size**-0.5,
    )
    accumulated = rows_written(
        case.score_table, [0] * len(rows), accumulate_lens, num_pages, block_size
    )
    case.scores[accumulated.expand_as(case.scores)] = 0.25
    return case


def check(case: Case) -> None:
    actual = case.run(ops.score_queries)
    assert_close(actual, case.run(ops.score_queries.reference), "scores")
    assert_untouched(actual, case.scores, case.written())


LENGTHS = [1, 15, 16, 17, 63, 129]
ROWS = [(17, 17, 0), (63, 5, 58), (129, 129, 0), (0, 0, 0), (70, 1, 69), (33, 33, 32)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout(dtype, layout):
    check(make_case(ROWS, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_float8_cache(head_size, dtype, layout):
    case = make_case(ROWS, head_size=head_size, dtype=dtype, layout=layout)
    check(replace(case, cache=case.cache.to_float8(), scale=0.3 * case.scale))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_heads(group, head_size):
    check(make_case(ROWS, group=group, head_size=head_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, block_size):
    check(make_case([(length, length, 0), (length, 1, length - 1)], block_size=block_size))


@pytest.mark.large
def test_long_row():
    check(make_case([(1000, 1000, 0), (700, 300, 400)], group=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2048, 2050, 3333])
def test_few_queries_of_many_keys(length, dtype):
    """A GPU shares the keys of each query out to several CTAs, of which not all rows fill each."""
    rows = [(length, 9, 0), (70, 30, 40), (length - 200, 1, 0), (0, 0, 0)]
    check(make_case(rows, num_kv_heads=1, group=3, dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_batch(data):
    row = st.integers(0, 90).flatmap(
        lambda seq: st.tuples(st.just(seq), st.integers(0, seq), st.integers(0, seq))
    )
    check(make_case(data.draw(st.lists(row, min_size=1, max_size=4)), head_size=64, block_size=8))


def test_lse_is_used_when_given():
    case = make_case(ROWS)
    expected = case.run(ops.score_queries)
    lse = torch.full(case.query.shape[:2], float("nan"))
    for row, (seq_len, num_queries) in enumerate(zip(case.seq_lens, case.query_lens, strict=True)):
        start = case.query_starts[row]
        keys = gather_entries(case.cache.key[0], case.cache.block_table[row], seq_len)
        queries = case.query[start : start + num_queries]
        logits = case.scale * torch.einsum("ihd,hjd->ihj", queries, keys.repeat_interleave(2, 0))
        hidden = torch.arange(seq_len) > torch.arange(seq_len - num_queries, seq_len)[:, None, None]
        lse[start : start + num_queries] = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
    with_lse = replace(case, lse=lse)
    check(with_lse)
    # As FlashAttention lays it out, [num_heads, num_tokens].
    check(replace(case, lse=lse.T.contiguous().T))
    assert_close(with_lse.run(ops.score_queries), expected, "scores")
    # Twice the denominator, half the attention.
    halved = replace(case, lse=lse + torch.log(torch.tensor(2.0)), accumulate_lens=[0] * len(ROWS))
    whole = replace(case, lse=lse, accumulate_lens=[0] * len(ROWS))
    assert_close(2 * halved.run(ops.score_queries), whole.run(ops.score_queries), "scores")


@pytest.mark.parametrize("scale", [0.0, 0.125, 30.0])
def test_every_query_pays_one_unit_of_attention(scale):
    """Also with logits in the thousands, whose exponentials overflow."""
    case = replace(make_case([(129, 40, 0)], group=4), scale=scale)
    scores = case.run(ops.score_queries)
    total = scores.masked_fill(~case.written(), 0).sum(dim=(0, 2))
    torch.testing.assert_close(total, torch.full_like(total, 40.0), rtol=1e-3, atol=0)


def test_chunks_add_up():
    whole = make_case([(129, 129, 0)])
    first = replace(whole, query_lens=[50], seq_lens=[50])
    second = replace(
        whole,
        query=whole.query[50:],
        query_lens=[79],
        accumulate_lens=[50],
        scores=first.run(ops.score_queries),
    )
    assert_close(second.run(ops.score_queries), whole.run(ops.score_queries), "scores")


@pytest.mark.parametrize("stride", [2, 3, 16, 64])
def test_sampled_queries(stride):
    """Also of chunks that have no query of their first or last stratum, or none at all."""
    rows = [(400, 400, 0), (330, 70, 260), (130, 129, 1), (70, 1, 69), (71, 1, 70), (0, 0, 0)]
    check(replace(make_case(rows, group=3, dtype=torch.bfloat16), sample_stride=stride))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_sampling_does_not_depend_on_how_a_prompt_is_cut(data):
    stride, length = data.draw(st.integers(1, 64)), data.draw(st.integers(2, 150))
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=4))
    whole = replace(make_case([(length, length, 0)]), sample_stride=stride)
    expected = whole.run(ops.score_queries)
    scores = whole.scores
    for start, stop in pairwise([0, *sorted(cuts), length]):
        part = replace(
            whole,
            query=whole.query[start:],
            query_lens=[stop - start],
            seq_lens=[stop],
            accumulate_lens=[start],
            scores=scores,
        )
        scores = part.run(ops.score_queries)
    assert_close(scores, expected, "scores")


@given(st.integers(1, 64), st.integers(0, 1 << 20))
def test_a_sample_has_one_position_of_every_stratum(stride, first):
    sampled = is_sampled(torch.arange(first * stride, (first + 50) * stride), stride)
    assert torch.all(sampled.view(50, stride).sum(dim=1) == 1)


@pytest.mark.parametrize("stride", [2, 4, 7, 64])
def test_every_place_of_a_stratum_is_as_likely(stride):
    """So that a sample is an unbiased estimate: any query counts as often as any other."""
    count = 1000 * stride
    places = is_sampled(torch.arange(count * stride), stride).view(count, stride)
    # Within five standard deviations of draws by chance.
    assert (places.sum(dim=0) - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("stride", [2, 5, 16])
def test_a_sampled_query_counts_for_its_whole_stratum(stride):
    case = replace(make_case([(15 * stride, 15 * stride, 0)]), sample_stride=stride)
    total = case.run(ops.score_queries).masked_fill(~case.written(), 0).sum(dim=(0, 2))
    torch.testing.assert_close(total, torch.full_like(total, 15 * stride), rtol=1e-3, atol=0)


def test_rows_may_share_key_blocks():
    case = make_case([(64, 16, 0), (64, 16, 0)])
    case.cache.block_table[1, :3] = case.cache.block_table[0, :3]
    check(case)


@pytest.mark.cpu_only
def test_result_does_not_depend_on_the_number_of_threads():
    # One thread takes more keys at a time of a row as long as this.
    rows = [(700, 700, 0), (2100, 1503, 597), (129, 1, 100)]
    case = make_case(rows, group=4, dtype=torch.bfloat16)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(case.run(ops.score_queries))
    finally:
        torch.set_num_threads(num_threads)
    assert_bitwise(results[1], results[0])
    assert_bitwise(results[2], results[0])


@pytest.mark.cpu_only
def test_opcheck():
    case = make_case([(20, 7, 13)], head_size=64, block_size=8)
    args = (
        case.query,
        case.cache.key[0].nan_to_num(),
        case.cache.block_table,
        *(int_tensor(v) for v in (case.query_starts, case.query_lens, case.seq_lens, [13])),
        case.score_table,
        None,
        case.scale,
        1,
        case.scores.nan_to_num(),
    )
    torch.library.opcheck(torch.ops.ems_vllm.score_queries.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: {"query": c.query.double()},
            "score_queries: query must have dtype float32, bfloat16 or float16, got Double",
        ),
        (
            lambda c: {"query": c.query.half()},
            "score_queries: key_cache must have dtype float16 or float8_e4m3fn on this device with "
            "queries of float16, got float32",
        ),
        (
            lambda c: {"query": c.query[..., :32]},
            r"key_cache must have shape \[\*, \*, \*, 32\], got \[\d+, 2, 16, 64\]",
        ),
        (
            lambda c: {"query": c.query[:, :3]},
            r"number of heads must be a multiple of the number of kv_heads \(2\), got 3",
        ),
        (
            lambda c: {"query": c.query.repeat(1, 1, 2)[..., ::2]},
            "query must be contiguous in its last dimension, got stride 2",
        ),
        (
            lambda c: {"scores": c.scores[:, :1]},
            r"scores must have shape \[\*, 2, 16\], got \[\d+, 1, 16\]",
        ),
        (lambda c: {"scores": c.scores.double()}, "scores must have dtype Float, got Double"),
        (lambda c: {"seq_lens": [40, 1]}, r"seq_lens must have shape \[1\], got \[2\]"),
        (lambda c: {"seq_lens": [65]}, r"seq_lens\[0\] must be in 0\.\.64, got 65"),
        (lambda c: {"query_lens": [41]}, r"query_lens\[0\] must be in 0\.\.40, got 41"),
        (lambda c: {"query_starts": [3]}, r"query_starts\[0\] must be in 0\.\.1, got 3"),
        (
            lambda c: {"seq_lens": [50]},
            rf"block_table\[0, 3\] must be in 0\.\.4, got {2**30}",
        ),
        (
            lambda c: {"score_table": c.score_table - c.score_table.max() - 1},
            r"score_table\[0, 0\] must be in 0\.\.7, got -",
        ),
        (
            lambda c: {"lse": torch.zeros(c.query.shape[1], len(c.query))},
            r"lse must have shape \[41, 4\], got \[4, 41\]",
        ),
        (lambda c: {"scale": -0.5}, r"scale must be at least 0, got -0\.5"),
        (lambda c: {"sample_stride": 0}, r"sample_stride must be in 1\.\.64, got 0"),
        (lambda c: {"sample_stride": 65}, r"sample_stride must be in 1\.\.64, got 65"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(change, message):
    case = make_case([(40, 40, 0)])
    with pytest.raises(RuntimeError, match=message):
        replace(case, **change(case)).run(ops.score_queries)
