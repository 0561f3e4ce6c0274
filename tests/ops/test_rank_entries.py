# SPDX-License-Identifier: Apache-2.0
"""rank_entries against its reference: exact, down to ties and the last bit of a weight."""

import pytest
import torch
from compare import assert_bitwise, assert_untouched
from generators import int_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ems_vllm import ops


def make_args(
    rows: list[tuple[int, int]],
    *,
    num_values: int = 0,
    share: float = 0.3,
    first: int = 3,
    protected_part: float = 0.0,
    num_layers: int = 2,
    num_kv_heads: int = 3,
) -> tuple:
    """Rows (num_entries, num_protected).

    Args:
        num_values: Number of different scores, 0 among them, for ties; 0 for as many as there are
            entries.
        protected_part: Of the entries, those that is_protected names; 0 for no mask.
    """
    columns = list(map(list, zip(*rows, strict=True)))
    shape = (num_layers, len(rows), num_kv_heads, max(columns[0]) + 4)
    # Slices of wider workspaces, with NaN wherever there is no entry.
    scores, weights = (torch.full((*shape[:3], shape[3] + 5), float("nan")) for _ in range(2))
    for row, length in enumerate(columns[0]):
        size = (num_layers, num_kv_heads, length)
        values = torch.randint(0, num_values, size) / 7 if num_values else torch.rand(size)
        scores[:, row, :, :length] = values
        weights[:, row, :, :length] = torch.rand(size)
    is_protected = torch.rand(shape) < protected_part if protected_part else None
    counts = map(int_tensor, columns)
    views = (values[..., : shape[3]] for values in (scores, weights))
    return next(views), *counts, is_protected, share, first, next(views)


def run(rank_entries, args: tuple) -> torch.Tensor:
    """Weights, with what lies between the rows of the workspace as it was."""
    before = args[-1]._base
    storage = before.clone()
    length = args[-1].shape[-1]
    rank_entries(*args[:-1], storage[..., :length])
    written = torch.arange(storage.shape[-1]) < length
    assert_untouched(storage, before, written)
    return storage[..., :length]


def check(args: tuple) -> torch.Tensor:
    weights = run(ops.rank_entries, args)
    assert_bitwise(weights, run(ops.rank_entries.reference, args))
    return weights


ROWS = [(129, 4), (63, 63), (1, 0), (0, 0), (100, 16), (1, 1)]


@pytest.mark.parametrize("num_values", [0, 5, 1], ids=["distinct", "ties", "all zero"])
@pytest.mark.parametrize("protected_part", [0.0, 0.2, 1.0])
def test_matches_reference(num_values, protected_part):
    check(make_args(ROWS, num_values=num_values, protected_part=protected_part))


@pytest.mark.parametrize("first", [0, 1, 26, 1000])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_shares(share, first):
    check(make_args([(200, 4)], share=share, first=first, num_layers=1, num_kv_heads=1))


def test_long_row():
    """Longer than a warp's run, and than one digit's place."""
    check(make_args([(3001, 4), (1025, 0)], num_layers=1, num_kv_heads=2))
    check(make_args([(2500, 4)], num_values=3, protected_part=0.1, num_layers=1, num_kv_heads=1))


def test_more_than_the_scratch_memory_holds():
    """On a GPU 32 MiB, 16 bytes for each of max_entries: 100 kv_heads at a time."""
    num_entries = torch.arange(130, dtype=torch.int32) % 7
    scores, weights = (torch.rand(1, 130, 1, 20_000) for _ in range(2))
    expected = weights.clone()
    args = scores, num_entries, num_entries // 3, None, 0.5, 2
    ops.rank_entries(*args, weights)
    ops.rank_entries.reference(*args, expected)
    assert_bitwise(weights, expected)


@pytest.mark.large
@pytest.mark.parametrize("num_values", [0, 100])
def test_very_long_row(num_values):
    check(make_args([(131_072, 4)], num_values=num_values, num_layers=1, num_kv_heads=2))


def test_all_magnitudes_are_in_order():
    """Of floats from the smallest one that there is, zeros of either sign alike."""
    values = [0.0, 1e-45, -0.0, 1e-38, 2e-38, 1e-20, 1.0, 1.0 + 2**-23, 3e38, 0.0]
    scores = torch.tensor(values)[None, None, None]
    weights = torch.zeros_like(scores)
    counts = int_tensor([len(values)]), int_tensor([0])
    ops.rank_entries(scores, *counts, None, 1.0, 0, weights)
    assert weights.flatten().argsort(descending=True).tolist() == [8, 7, 6, 5, 4, 3, 1, 0, 2, 9]


def test_what_is_no_score_is_ranked_too():
    args = make_args([(40, 2)], num_layers=1, num_kv_heads=1)
    args[0][0, 0, 0, 5:8] = torch.tensor([-0.5, float("nan"), float("inf")])
    check(args)


@st.composite
def any_row(draw: st.DrawFn) -> tuple[int, int]:
    num_entries = draw(st.integers(0, 70))
    return num_entries, draw(st.integers(0, num_entries))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(any_row(), min_size=1, max_size=3),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.1, 0.65, 1.0]),
    st.integers(0, 80),
)
def test_any_batch(rows, num_values, protected_part, share, first):
    """Two orders: an entry has the weight of the claim that comes first."""
    options = {"protected_part": protected_part, "num_layers": 1}
    args = make_args(rows, num_values=num_values, share=share, first=first, **options)
    other = make_args(rows, num_values=4, **options)[0]
    weights = args[-1].zero_()
    ops.rank_entries(*args)
    ops.rank_entries(other, *args[1:4], 1.0, 0, weights)
    for row, (num_entries, num_protected) in enumerate(rows):
        for head in range(weights.shape[2]):
            candidates = set(range(num_protected, num_entries))
            if args[3] is not None:
                candidates -= set(args[3][0, row, head].nonzero().flatten().tolist())
            claims = dict.fromkeys(candidates, float("inf"))
            for scores, part, leading in ((args[0], share, first), (other, 1.0, 0)):
                values = scores[0, row, head].tolist()
                # Python's sort is stable, too.
                ranking = sorted(sorted(candidates), key=lambda e, values=values: -values[e])
                for rank, entry in enumerate(ranking):
                    claim = rank / leading if rank < leading else 1 + (rank - leading) / part
                    claims[entry] = min(claims[entry], claim)
            got = weights[0, row, head].tolist()
            for entry in range(len(got)):
                others = 1.0 if entry < num_entries else 0.0
                expected = 1 / (1 + claims[entry]) if entry in claims else others
                assert got[entry] == pytest.approx(expected, rel=1e-6)


@pytest.mark.cpu_only
def test_opcheck():
    args = make_args([(30, 2)], protected_part=0.1)
    args = (args[0].nan_to_num(), *args[1:-1], args[-1].nan_to_num())
    ops.rank_entries(*args)
    torch.library.opcheck(torch.ops.ems_vllm.rank_entries.default, args)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 3, 34), r"rank_entries: scores must have shape \[\*, \*, \*, \*\]"),
        (1, int_tensor([35]), r"num_entries\[0\] must be in 0\.\.34, got 35"),
        (2, int_tensor([31]), r"num_protected\[0\] must be in 0\.\.30, got 31"),
        (3, torch.zeros(2, 1, 3, 34), "is_protected must have dtype Bool, got Float"),
        (
            3,
            torch.zeros(2, 1, 3, 9).bool(),
            r"is_protected must be as long as scores \(34\), got 9",
        ),
        (4, 0.0, "share must be more than 0, got 0"),
        (5, -1, "first must be at least 0, got -1"),
        (6, torch.zeros(2, 1, 3, 33), r"weights must be as long as scores \(34\), got 33"),
        (6, torch.zeros(2, 1, 2, 34), r"weights must have shape \[2, 1, 3, \*\]"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, value, message):
    args = list(make_args([(30, 2)]))
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        ops.rank_entries(*args)
