# SPDX-License-Identifier: Apache-2.0
"""select_entries against its reference: exact, since ranks are defined down to ties."""

import pytest
import torch
from compare import assert_bitwise
from generators import int_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops


def make_args(
    rows: list[tuple[int, int, int, int]],
    *,
    mass_limit: float = 1.0,
    num_values: int = 0,
    num_layers: int = 2,
    num_kv_heads: int = 3,
) -> tuple:
    """Rows (num_entries, budget, num_protected, merge_limit).

    Args:
        num_values: number of different scores, for ties; 0 for as many as there are entries.
    """
    columns = list(map(list, zip(*rows, strict=True)))
    max_entries, max_budget, _, max_merges = map(max, columns)
    # A slice of a wider workspace, with NaN wherever there is no entry.
    scores = torch.full((num_layers, len(rows), num_kv_heads, max_entries + 9), float("nan"))
    for row, length in enumerate(columns[0]):
        # Sums of multiples of 2**-12 are exact, whatever their order.
        steps = torch.randint(0, num_values or 4096, (num_layers, num_kv_heads, length))
        scores[:, row, :, :length] = steps / 4096
    shape = scores.shape[:3]
    kept_idx = torch.full((*shape, max_budget + 2), -9, dtype=torch.int32)
    merge_idx = torch.full((*shape, max_merges), -9, dtype=torch.int32)
    values = scores[..., : max_entries + 4]
    return values, *map(int_tensor, columns), mass_limit, kept_idx, merge_idx


def run(select_entries, args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    kept_idx, merge_idx = args[-2].clone(), args[-1].clone()
    select_entries(*args[:-2], kept_idx, merge_idx)
    return kept_idx, merge_idx


def check(args: tuple) -> None:
    for actual, expected in zip(
        run(ops.select_entries, args), run(ops.select_entries.reference, args), strict=True
    ):
        assert_bitwise(actual, expected)


ROWS = [
    (129, 48, 4, 64),
    (63, 63, 0, 5),
    (1, 1, 1, 1),
    (0, 0, 0, 0),
    (100, 16, 16, 90),
    (40, 0, 0, 7),
]


@pytest.mark.parametrize("num_values", [0, 5, 1], ids=["distinct", "ties", "all equal"])
@pytest.mark.parametrize("mass_limit", [0.0, 0.5, 0.9, 1.0])
def test_matches_reference(mass_limit, num_values):
    check(make_args(ROWS, mass_limit=mass_limit, num_values=num_values))


def test_long_row():
    check(make_args([(1000, 256, 4, 512), (999, 1, 0, 998)]))


def test_no_merging():
    args = make_args([(50, 20, 2, 0), (20, 20, 0, 0)])
    assert args[-1].shape[-1] == 0
    check(args)


def test_zero_scores_rank_by_index():
    scores = torch.tensor([0.0, -0.0, 0.0, 0.0, -0.0])[None, None, None]
    kept_idx = torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    merge_idx = torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    counts = map(int_tensor, ([5], [2], [0], [2]))
    ops.select_entries(scores, *counts, 0.5, kept_idx, merge_idx)
    assert kept_idx.tolist() == [[[[0, 1]]]]
    assert merge_idx.tolist() == [[[[2, 3]]]]


@st.composite
def any_row(draw: st.DrawFn) -> tuple[int, int, int, int]:
    num_entries = draw(st.integers(0, 60))
    budget = draw(st.integers(0, num_entries))
    return num_entries, budget, draw(st.integers(0, budget)), draw(st.integers(0, 70))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(any_row(), min_size=1, max_size=4),
    st.sampled_from([0.3, 0.75, 1.0]),
    st.sampled_from([0, 1, 3]),
)
def test_any_batch(rows, mass_limit, num_values):
    args = make_args(rows, mass_limit=mass_limit, num_values=num_values)
    check(args)
    kept_idx, merge_idx = run(ops.select_entries, args)
    for row, (num_entries, budget, num_protected, _) in enumerate(rows):
        for kept, merged in zip(
            kept_idx[:, row].flatten(0, 1), merge_idx[:, row].flatten(0, 1), strict=False
        ):
            kept, merged = kept[kept >= 0].tolist(), merged[merged >= 0].tolist()
            assert len(kept) == budget
            assert kept[:num_protected] == list(range(num_protected))
            assert len({*kept, *merged}) == len(kept) + len(merged)
            assert all(entry < num_entries for entry in [*kept, *merged])


@pytest.mark.cpu_only
def test_opcheck():
    args = make_args([(30, 8, 2, 6)])
    args = (args[0].nan_to_num(), *args[1:])
    ops.select_entries(*args)
    torch.library.opcheck(torch.ops.ems_vllm.select_entries.default, args)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 3, 40), r"select_entries: scores must have shape \[\*, \*, \*, \*\]"),
        (0, torch.zeros(2, 1, 3, 9), r"num_entries\[0\] must be in 0\.\.9, got 30"),
        (2, int_tensor([31]), r"budgets\[0\] must be in 0\.\.10, got 31"),
        (3, int_tensor([9]), r"num_protected\[0\] must be in 0\.\.8, got 9"),
        (4, int_tensor([7]), r"merge_limits\[0\] must be in 0\.\.6, got 7"),
        (6, torch.zeros(2, 1, 3, 10), "kept_idx must have dtype Int, got Float"),
        (7, torch.zeros(1, 1, 3, 6).int(), r"merge_idx must have shape \[2, 1, 3, \*\]"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, value, message):
    args = list(make_args([(30, 8, 2, 6)]))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        ops.select_entries(*args)
