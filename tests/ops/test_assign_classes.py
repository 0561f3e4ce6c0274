# SPDX-License-Identifier: Apache-2.0
"""assign_classes: the class of an entry is right when no other is better by more than rounding."""

import pytest
import torch
from compare import assert_bitwise
from generators import LAYOUTS, PagedCache, int_tensor, paged_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import Selection, random_selection

from ems_vllm import ops
from ems_vllm.ops.paging import gather_entries

# Cosines of float32 vectors of up to 256 elements, against float64.
EPSILON = 1e-5


def run(
    assign_classes,
    cache: PagedCache,
    selection: Selection,
    num_protected: list[int],
    threshold: float,
) -> torch.Tensor:
    class_idx = torch.full_like(selection.merge_idx, -9)
    assign_classes(
        cache.key,
        cache.value,
        cache.block_table,
        selection.kept_idx,
        selection.merge_idx,
        int_tensor(selection.budgets),
        int_tensor(num_protected),
        threshold,
        class_idx,
    )
    return class_idx


def redundancies(
    cache: PagedCache, selection: Selection, num_protected: int, at: tuple[int, int, int]
) -> torch.Tensor:
    """[num_merges, budget] in float64; -1 for a centre that takes no members."""
    layer, row, head = at
    centres = selection.kept_idx[at][: selection.budgets[row]].long()
    members = selection.merge_idx[at].clamp(min=0).long()
    result = torch.ones(len(members), len(centres), dtype=torch.float64)
    for tensor in (cache.key, cache.value):
        entries = gather_entries(tensor[layer], cache.block_table[row], selection.lens[row])[head]
        entries = entries.double()
        cosines = torch.cosine_similarity(
            entries[members][:, None], entries[centres][None], dim=-1, eps=1e-300
        )
        result *= cosines.clamp(min=0)
    result[:, centres < num_protected] = -1
    return result


def check(
    cache: PagedCache, selection: Selection, num_protected: list[int], threshold: float
) -> None:
    actual = run(ops.assign_classes, cache, selection, num_protected, threshold)
    num_layers, num_rows, num_kv_heads, _ = actual.shape
    for layer in range(num_layers):
        for row in range(num_rows):
            zero_class = selection.budgets[row]
            for head in range(num_kv_heads):
                at = (layer, row, head)
                if (selection.merge_idx[at] < 0).all():
                    assert (actual[at] == zero_class).all()
                    continue
                table = redundancies(cache, selection, num_protected[row], at)
                for i, cls in enumerate(actual[at].tolist()):
                    best = table[i].max() if zero_class else -1.0
                    if selection.merge_idx[at][i] < 0:
                        assert cls == zero_class
                    elif cls == zero_class:
                        assert best < threshold + EPSILON
                    else:
                        assert table[i, cls] >= max(best, threshold) - EPSILON


ROWS = [(129, 48, 60), (63, 33, 7), (1, 1, 0), (0, 0, 0), (70, 70, 0), (40, 5, 35)]
PROTECTED = [4, 0, 1, 0, 0, 2]


def make_case(rows=ROWS, **shape) -> tuple[PagedCache, Selection]:
    cache = paged_cache([length for length, _, _ in rows], num_layers=2, **shape)
    return cache, random_selection(rows, *cache.key.shape[::2][:2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout(dtype, layout):
    check(*make_case(dtype=dtype, layout=layout), PROTECTED, 0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_float8_cache(head_size, layout):
    cache, selection = make_case(dtype=torch.float16, layout=layout, head_size=head_size)
    check(cache.to_float8(), selection, PROTECTED, 0.05)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.04, 2.0])
def test_head_size_and_threshold(threshold, head_size):
    check(*make_case(head_size=head_size, dtype=torch.bfloat16), PROTECTED, threshold)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 129, 1000])
def test_lengths(length, block_size):
    budget = -(-length // 2)
    cache, selection = make_case([(length, budget, length - budget)], block_size=block_size)
    check(cache, selection, [0], 0.05)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_batch(data):
    row = st.integers(0, 50).flatmap(
        lambda length: st.integers(0, length).flatmap(
            lambda budget: st.tuples(
                st.just(length), st.just(budget), st.integers(0, length - budget)
            )
        )
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    check(*make_case(rows, head_size=64, block_size=8), [0] * len(rows), 0.1)


@pytest.mark.parametrize("num_centres", [3, 70, 300])
def test_ties_go_to_the_lower_rank(num_centres):
    """Equal centres have equal products, in whichever tile they are."""
    length = num_centres + 1
    cache = paged_cache([length], num_kv_heads=1)
    selection = Selection([length], [num_centres], None, None)
    selection.kept_idx = torch.arange(num_centres, dtype=torch.int32)[None, None, None]
    selection.merge_idx = int_tensor([num_centres])[None, None, None]
    for tensor in (cache.key, cache.value):
        entries = torch.arange(length)
        blocks = cache.block_table[0, entries // 16].long()
        tensor[0, blocks, 0, entries % 16] = torch.rand(64) + 0.1
    assert run(ops.assign_classes, cache, selection, [0], 0.5).item() == 0
    assert run(ops.assign_classes, cache, selection, [2], 0.5).item() == 2
    assert run(ops.assign_classes, cache, selection, [num_centres], 0.5).item() == num_centres


def test_zero_vectors_are_similar_to_nothing():
    cache, selection = make_case([(20, 10, 10)])
    cache.key[:, cache.block_table[0, 0]] = 0
    actual = run(ops.assign_classes, cache, selection, [0], 1e-6)
    in_first_block = selection.merge_idx < 16
    assert (actual[in_first_block] == 10).all()
    check(cache, selection, [0], 0.05)


def test_agrees_with_the_reference_on_clear_cases():
    """Members that are noisy copies of one centre each."""
    cache, selection = make_case([(64, 32, 32)])
    for layer, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        centres = selection.kept_idx[layer, 0, head].tolist()
        for rank, entry in enumerate(selection.merge_idx[layer, 0, head].tolist()):
            source, target = centres[(7 * rank) % 32], entry
            for tensor in (cache.key, cache.value):
                page = tensor[layer, :, head]
                block = cache.block_table[0, source // 16], cache.block_table[0, target // 16]
                copy = page[block[0], source % 16] + 0.05 * torch.randn(64)
                page[block[1], target % 16] = copy
    assert_bitwise(
        run(ops.assign_classes, cache, selection, [3], 0.5),
        run(ops.assign_classes.reference, cache, selection, [3], 0.5),
    )


def args_for_opcheck() -> list:
    cache, selection = make_case([(30, 10, 8)], head_size=64, block_size=8)
    return [
        cache.key.nan_to_num(),
        cache.value.nan_to_num(),
        cache.block_table,
        selection.kept_idx,
        selection.merge_idx,
        int_tensor([10]),
        int_tensor([0]),
        0.1,
        torch.zeros_like(selection.merge_idx),
    ]


@pytest.mark.cpu_only
def test_opcheck():
    args = tuple(args_for_opcheck())
    ops.assign_classes(*args)
    torch.library.opcheck(torch.ops.ems_vllm.assign_classes.default, args)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, lambda t: t.half(), "assign_classes: value_cache must have dtype Float, got Half"),
        (1, lambda t: t[..., :8], r"value_cache must have shape \[2, 6, 2, 8, 64\]"),
        (3, lambda t: t + 100, r"kept_idx\[0\] must be in 0\.\.39, got 1\d\d"),
        (4, lambda t: t - 50, r"merge_idx\[\d\] must be in 0\.\.39, got -"),
        (4, lambda t: t.clamp(min=35), rf"block_table\[0, 4\] must be in 0\.\.5, got {2**30}"),
        (5, lambda t: t + 1, r"budgets\[0\] must be in 0\.\.10, got 11"),
        (8, lambda t: t[..., 1:], r"class_idx must be as long as merge_idx \(8\), got 7"),
        (8, lambda t: t.long(), "class_idx must have dtype Int, got Long"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, change, message):
    args = args_for_opcheck()
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.assign_classes(*args)
