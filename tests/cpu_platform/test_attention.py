# SPDX-License-Identifier: Apache-2.0
"""The CPU attention backend against attention written out in float64, one query at a time."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backend import CommonAttentionMetadata

from ems_vllm.cpu_platform import attention_calls
from ems_vllm.cpu_platform.attention import TorchCPUBackend

HEAD_SIZE = 32
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
# (tokens computed before, query tokens) of each request.
BATCHES = {
    "decode": [(40, 1)],
    "decodes_of_one_length": [(40, 1), (40, 1), (40, 1)],
    "decodes_of_all_lengths": [(1, 1), (900, 1), (63, 1), (64, 1), (0, 1)],
    "prefill": [(0, 70)],
    "prefill_chunk": [(70, 33)],
    "mixed": [(12, 1), (0, 19), (100, 1), (48, 32), (5, 2), (13, 1)],
    "padding_request": [(12, 1), (0, 0), (3, 4)],
}


@dataclass
class Case:
    num_heads: int = 4
    num_kv_heads: int = 2
    block_size: int = 16
    sliding_window: int | None = None
    dtype: torch.dtype = torch.float32
    slots_before_heads: bool = True
    sinks: bool = False
    soft_cap: float | None = None


CASES = {
    "gqa": Case(),
    "mha": Case(num_kv_heads=4),
    "mqa": Case(num_kv_heads=1),
    "block_of_1": Case(block_size=1),
    "block_of_24": Case(block_size=24),
    "heads_before_slots": Case(slots_before_heads=False),
    "window": Case(sliding_window=20),
    "window_of_1": Case(sliding_window=1),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "sinks": Case(sinks=True),
    "sinks_and_window": Case(sinks=True, sliding_window=20),
    "sinks_bfloat16": Case(sinks=True, dtype=torch.bfloat16),
    "soft_cap": Case(soft_cap=0.5),
    "soft_cap_and_window": Case(soft_cap=0.5, sliding_window=20),
    "soft_cap_bfloat16": Case(soft_cap=0.5, dtype=torch.bfloat16),
    "soft_cap_and_sinks": Case(soft_cap=0.5, sinks=True),
}


@dataclass
class Result:
    """Attention and the log of its softmax denominators without sinks.

    Attributes:
        out: [num_tokens, num_heads, head_size].
        lse: [num_tokens, num_heads], float32.
    """

    out: torch.Tensor
    lse: torch.Tensor


def run_backend(
    case: Case, batch: list[tuple[int, int]], keep_softmax_lse: bool = False
) -> tuple[Result, Result]:
    """Results of the backend and of the naive computation."""
    torch.manual_seed(0)
    seq_lens = [computed + queries for computed, queries in batch]
    num_tokens = sum(queries for _, queries in batch)
    max_blocks = max(math.ceil(n / case.block_size) for n in seq_lens)
    num_blocks = 1 + len(batch) * max_blocks
    block_table = 1 + torch.randperm(num_blocks - 1, dtype=torch.int32).view(len(batch), -1)

    # NaN wherever nothing has been written: an entry that is read by mistake shows.
    shape = (num_blocks, case.num_kv_heads, case.block_size, 2 * HEAD_SIZE)
    cache = torch.full(shape, float("nan"), dtype=case.dtype)
    if case.slots_before_heads:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)

    sinks = torch.randn(case.num_heads, dtype=case.dtype) if case.sinks else None
    impl = TorchCPUBackend.get_impl_cls()(
        case.num_heads,
        HEAD_SIZE,
        scale=HEAD_SIZE**-0.5,
        num_kv_heads=case.num_kv_heads,
        sliding_window=case.sliding_window,
        logits_soft_cap=case.soft_cap,
        sinks=sinks,
    )
    impl.keep_softmax_lse = keep_softmax_lse
    query = torch.randn(num_tokens, case.num_heads, HEAD_SIZE, dtype=case.dtype)
    expected = Result(torch.empty_like(query), torch.empty(num_tokens, case.num_heads))
    row = 0
    slot_mapping = []
    for blocks, (computed, queries) in zip(block_table, batch, strict=True):
        seq_len = computed + queries
        keys, values = torch.randn(2, seq_len, case.num_kv_heads, HEAD_SIZE).to(case.dtype)
        positions = torch.arange(seq_len)
        slots = blocks[positions // case.block_size].long() * case.block_size
        slots += positions % case.block_size
        impl.do_kv_cache_update(None, keys, values, cache, slots)
        slot_mapping.append(slots[computed:])
        for position in range(computed, seq_len):
            expected.out[row], expected.lse[row] = naive(
                query[row], keys, values, position, case, sinks
            )
            row += 1

    query_start_loc = torch.tensor([0] + [queries for _, queries in batch]).cumsum(0).int()
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(batch),
        num_actual_tokens=num_tokens,
        max_query_len=max(queries for _, queries in batch),
        max_seq_len=max(seq_lens),
        block_table_tensor=block_table,
        slot_mapping=torch.cat(slot_mapping),
    )
    builder = TorchCPUBackend.get_builder_cls()(
        SimpleNamespace(block_size=case.block_size),
        ["layer"],
        SimpleNamespace(model_config=SimpleNamespace(dtype=case.dtype)),
        torch.device("cpu"),
    )
    metadata = builder.build(0, common)
    output = torch.full((num_tokens, case.num_heads * HEAD_SIZE), float("nan"), dtype=case.dtype)
    result = impl.forward(None, query, None, None, cache, metadata, output)
    assert result is output
    return Result(output.view_as(query), impl.softmax_lse), expected


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
    case: Case,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    first = max(0, position + 1 - (case.sliding_window or position + 1))
    out = torch.empty(query.shape, dtype=torch.float64)
    lse = torch.empty(case.num_heads, dtype=torch.float64)
    for head in range(case.num_heads):
        kv_head = head // (case.num_heads // case.num_kv_heads)
        k = keys[first : position + 1, kv_head].double()
        v = values[first : position + 1, kv_head].double()
        logits = k @ query[head].double() * HEAD_SIZE**-0.5
        if case.soft_cap is not None:
            logits = case.soft_cap * (logits / case.soft_cap).tanh()
        weights = logits.exp()
        denominator = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0)
        out[head] = weights @ v / denominator
        lse[head] = weights.sum().log()
    return out, lse


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_naive_attention(case: Case, batch: list[tuple[int, int]]) -> None:
    result, expected = run_backend(case, batch)
    torch.testing.assert_close(result.out, expected.out, **TOLERANCE[case.dtype])
    assert result.lse is None


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keeps_the_softmax_lse_when_asked(case: Case, batch: list[tuple[int, int]]) -> None:
    result, expected = run_backend(case, batch, keep_softmax_lse=True)
    torch.testing.assert_close(result.out, expected.out, **TOLERANCE[case.dtype])
    torch.testing.assert_close(result.lse, expected.lse, **TOLERANCE[case.dtype])


def test_decodes_that_exceed_the_gather_limit_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_calls, "_MAX_GATHERED_ENTRIES", 100)
    result, expected = run_backend(Case(), [(45, 1)] * 5)
    torch.testing.assert_close(result.out, expected.out, **TOLERANCE[torch.float32])


def test_decodes_of_similar_length_share_a_call() -> None:
    seq_lens = [100, 8000, 60, 7000, 100]
    batch = attention_calls.BatchShape(
        query_start_loc=range(6),
        seq_lens=seq_lens,
        block_table=torch.zeros(5, 500, dtype=torch.int32),
        block_size=16,
    )
    calls = attention_calls.cut_into_calls(batch, None, torch.float32)
    assert [tuple(call.entries.shape) for call in calls] == [(2, 8000), (3, 100)]
    windowed = attention_calls.cut_into_calls(batch, 50, torch.float32)
    assert [tuple(call.entries.shape) for call in windowed] == [(5, 50)]
    assert windowed[0].mask is None


def test_padding_tokens_are_not_written() -> None:
    impl = TorchCPUBackend.get_impl_cls()(2, HEAD_SIZE, 1.0, num_kv_heads=2)
    cache = torch.zeros(3, 2, 4, 2 * HEAD_SIZE)
    key = torch.ones(5, 2, HEAD_SIZE)
    impl.do_kv_cache_update(None, key, 2 * key, cache, torch.tensor([5, -1, 10]))
    written = torch.zeros(3, 4, dtype=torch.bool)
    written[1, 1] = written[2, 2] = True
    assert torch.equal(cache.any(-1).all(1), written)
    assert cache[1, 0, 1].tolist() == [1.0] * HEAD_SIZE + [2.0] * HEAD_SIZE


def test_float8_cache_holds_scaled_and_saturated_numbers() -> None:
    impl = TorchCPUBackend.get_impl_cls()(1, HEAD_SIZE, 1.0, kv_cache_dtype="fp8")
    layer = SimpleNamespace(_k_scale_float=2.0, _v_scale_float=0.5)
    cache = torch.zeros(2, 1, 4, 2 * HEAD_SIZE, dtype=torch.uint8)
    key = torch.full((2, 1, HEAD_SIZE), 3.0)
    value = torch.stack([key[0], -1000 * key[0]])
    impl.do_kv_cache_update(layer, key, value, cache, torch.tensor([5, 6]))
    stored = cache.view(torch.float8_e4m3fn).float()
    assert stored[1, 0, 1].tolist() == [1.5] * HEAD_SIZE + [6.0] * HEAD_SIZE
    assert stored[1, 0, 2].tolist() == [1.5] * HEAD_SIZE + [-448.0] * HEAD_SIZE
    assert not stored[0].any()


def test_profiling_run_has_defined_output() -> None:
    impl = TorchCPUBackend.get_impl_cls()(2, HEAD_SIZE, 1.0)
    output = torch.full((3, 2, HEAD_SIZE), float("nan"))
    assert not impl.forward(None, None, None, None, None, None, output).any()


@pytest.mark.parametrize(
    "unsupported",
    [
        {"alibi_slopes": [0.5, 0.25]},
        {"attn_type": "encoder_only"},
        {"kv_cache_dtype": "fp8_e5m2"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_unsupported_attention_is_refused(unsupported: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match="TORCH_CPU attention does not support"):
        TorchCPUBackend.get_impl_cls()(2, HEAD_SIZE, 1.0, **unsupported)


@pytest.mark.parametrize(
    "unsupported", [{"causal": False}, {"mm_req_doc_ranges": {0: [(1, 3)]}}], ids=["mask", "images"]
)
def test_attention_to_later_tokens_is_refused(unsupported: dict[str, object]) -> None:
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=lengths,
        query_start_loc_cpu=lengths,
        seq_lens=lengths[1:],
        num_reqs=1,
        num_actual_tokens=4,
        max_query_len=4,
        max_seq_len=4,
        block_table_tensor=torch.ones(1, 1, dtype=torch.int32),
        slot_mapping=torch.arange(16, 20),
        **unsupported,
    )
    builder = TorchCPUBackend.get_builder_cls()(
        SimpleNamespace(block_size=16),
        ["layer"],
        SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32)),
        torch.device("cpu"),
    )
    with pytest.raises(NotImplementedError, match="causal only"):
        builder.build(0, common)
