# SPDX-License-Identifier: Apache-2.0
"""merge_compact against its reference; sources and targets overlap in most cases."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from compare import assert_bitwise, assert_close, assert_close_sum, assert_untouched
from generators import LAYOUTS, PagedCache, int_tensor, paged_cache, rows_written
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import Selection, random_selection
from torch.nn.functional import pad

import ems_vllm
from ems_vllm import ops
from ems_vllm.ops import KeyMerge
from ems_vllm.ops.paging import gather_entries


@dataclass
class Case:
    cache: PagedCache
    selection: Selection
    weights: torch.Tensor
    carry: torch.Tensor | None
    key_merge: KeyMerge
    sums_values: bool
    mass_keys: torch.Tensor | None
    accumulated_pages: torch.Tensor | None
    class_idx: torch.Tensor
    target_columns: list[int]
    rows_together: int = 1

    def args(self) -> list:
        """Arguments that own their outputs."""
        cache = self.cache.clone()
        return [
            cache.key,
            cache.value,
            None if self.accumulated_pages is None else self.accumulated_pages.clone(),
            self.weights,
            self.carry,
            self.key_merge,
            self.sums_values,
            self.mass_keys,
            cache.block_table,
            self.selection.kept_idx,
            self.selection.merge_idx,
            self.class_idx,
            int_tensor(self.selection.budgets),
            int_tensor(self.target_columns),
            self.rows_together,
        ]

    def run(self, merge_compact) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        args = self.args()
        merge_compact(*args)
        return args[0], args[1], args[2]

    def written(self) -> torch.Tensor:
        starts = [column * self.cache.block_size for column in self.target_columns]
        ends = [
            start + budget for start, budget in zip(starts, self.selection.budgets, strict=True)
        ]
        num_blocks = self.cache.key.shape[1]
        return rows_written(self.cache.block_table, starts, ends, num_blocks, self.cache.block_size)

    def sharing(self, rows_together: int) -> "Case":
        """The same in groups of rows; a row's targets are the next one's first blocks, if full."""
        lens, budgets = self.selection.lens, self.selection.budgets
        own, block_size = self.cache.block_table, self.cache.block_size
        table = own.clone()
        for row, (start, budget) in enumerate(zip(self.target_columns, budgets, strict=True)):
            place = row % rows_together
            other = row - place + (place + 1) % rows_together
            num_targets = -(-budget // block_size)
            if num_targets * block_size <= lens[other]:
                table[row, start : start + num_targets] = own[other, :num_targets]
        return replace(
            self, cache=replace(self.cache, block_table=table), rows_together=rows_together
        )


def make_case(
    rows: list[tuple[int, int, int]],
    *,
    with_scores: bool = True,
    key_merge: KeyMerge = KeyMerge.DIRECTION,
    sums_values: bool = False,
    with_mass: bool = False,
    share_merged: float = 0.8,
    **shape,
) -> Case:
    """Rows (num_entries, budget, num_merges); targets are the last columns of a row."""
    lens = [length for length, _, _ in rows]
    cache = paged_cache(lens, num_layers=2, **shape)
    num_layers, num_blocks, num_kv_heads, block_size, _ = cache.key.shape
    selection = random_selection(rows, num_layers, num_kv_heads)
    head_shape = (num_layers, len(rows), num_kv_heads)
    weights = torch.rand(*head_shape, max(lens) + 3)
    carry = torch.rand(*head_shape, max(lens) + 3)
    mass_keys = torch.randn(*head_shape, cache.key.shape[-1])
    for row, length in enumerate(lens):
        weights[:, row, :, length:] = carry[:, row, :, length:] = float("nan")
    class_idx = torch.zeros_like(selection.merge_idx)
    for row, budget in enumerate(selection.budgets):
        # Few different classes, so that some have several members; the rest is the zero class.
        classes = torch.randint(0, max(min(budget, 20), 1), class_idx[:, row].shape)
        is_merged = torch.rand(classes.shape) < share_merged
        class_idx[:, row] = torch.where(is_merged, classes, budget).int()
    page_shape = (num_layers, num_blocks, num_kv_heads, block_size)
    columns = [-(-length // block_size) - -(-budget // block_size) for length, budget, _ in rows]
    return Case(
        cache=cache,
        selection=selection,
        weights=weights,
        carry=carry if with_scores else None,
        key_merge=key_merge,
        sums_values=sums_values,
        mass_keys=mass_keys if with_mass else None,
        accumulated_pages=torch.full(page_shape, float("nan")) if with_scores else None,
        class_idx=class_idx,
        target_columns=columns,
    )


def check(case: Case) -> None:
    actual, expected = case.run(ops.merge_compact), case.run(ops.merge_compact.reference)
    written = case.written()
    assert_close(actual[0], expected[0], "merged")
    if case.sums_values:
        magnitudes = replace(case, cache=case.cache.clone())
        magnitudes.cache.value.abs_()
        _, sizes, _ = magnitudes.run(ops.merge_compact.reference)
        assert_close_sum(actual[1], expected[1], sizes)
    else:
        assert_close(actual[1], expected[1], "merged")
    for before, after in zip((case.cache.key, case.cache.value), actual[:2], strict=True):
        assert_untouched(after, before, written[..., None])
    if case.accumulated_pages is not None:
        assert_close(actual[2], expected[2], "scores")
        assert_untouched(actual[2], case.accumulated_pages, written)


ROWS = [(129, 48, 60), (63, 33, 7), (1, 1, 0), (0, 0, 0), (70, 70, 0), (40, 5, 35)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_layout(dtype, layout):
    check(make_case(ROWS, dtype=dtype, layout=layout))


@pytest.mark.parametrize(
    ("key_merge", "sums_values", "with_mass"),
    [
        (KeyMerge.DIRECTION, False, True),
        (KeyMerge.CENTRE, False, True),
        (KeyMerge.CENTRE, False, False),
        (KeyMerge.CENTRE, True, False),
        (KeyMerge.MEAN, False, False),
        (KeyMerge.MEAN, True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 80])
def test_what_classes_are_made_of(dtype, head_size, key_merge, sums_values, with_mass):
    case = make_case(
        ROWS,
        dtype=dtype,
        head_size=head_size,
        key_merge=key_merge,
        sums_values=sums_values,
        with_mass=with_mass,
    )
    check(case)
    case.weights[..., ::3] = 0.0
    check(case)


def test_keys_that_are_neither_merged_nor_given_mass_are_moved_bit_for_bit():
    case = make_case(ROWS, key_merge=KeyMerge.CENTRE, dtype=torch.bfloat16)
    assert_bitwise(case.run(ops.merge_compact)[0], case.run(ops.merge_compact.reference)[0])


def test_mass_gives_a_class_the_attention_of_its_entries():
    """Two entries with the same key: where one stands for both, a softmax cannot tell."""
    query = torch.tensor([0.7, -0.4])
    other = torch.tensor([0.3, 0.9])
    both = torch.stack([other, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])])
    mass_key = query / query.dot(query)
    key, value, _ = class_of_two(
        [1.0, 2.0], [1.0, 2.0], [0.5, 0.5], KeyMerge.CENTRE, mass_key=mass_key.tolist()
    )
    values = torch.tensor([[0.2, 0.3], [1.0, 0.0], [0.0, 1.0]])
    expected = (both @ query).softmax(0) @ values
    got = (torch.stack([other, key]) @ query).softmax(0) @ torch.stack([values[0], value])
    torch.testing.assert_close(got, expected)


def test_mass_is_bounded_by_the_number_of_entries():
    key, _, _ = class_of_two([5.0, 0.0], [0.0, 2.0], [1e-6, 4.0], KeyMerge.CENTRE, [0.0, 1.0])
    torch.testing.assert_close(key, torch.tensor([5.0, math.log(2)]))
    key, _, _ = class_of_two([5.0, 0.0], [0.0, 2.0], [0.0, 4.0], KeyMerge.CENTRE, [0.0, 1.0])
    torch.testing.assert_close(key, torch.tensor([5.0, math.log(2)]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_float8_cache(head_size, layout):
    case = make_case(ROWS, dtype=torch.float16, layout=layout, head_size=head_size)
    check(replace(case, cache=case.cache.to_float8()))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("with_scores", [True, False])
def test_head_size(with_scores, head_size):
    check(make_case(ROWS, head_size=head_size, with_scores=with_scores, dtype=torch.bfloat16))


@pytest.mark.parametrize("head_size", [72, 512])
def test_other_head_sizes(implementation, head_size):
    """The CPU takes any. Start-up keeps the CUDA kernels from ever seeing one."""
    case = make_case(ROWS, head_size=head_size)
    if implementation == "cpu":
        check(case)
        return
    sizes = ", ".join(map(str, ems_vllm.build_info()["cuda_head_sizes"])) or r"[\d, ]+"
    message = f"merge_compact: head_size must be one of {sizes} on a GPU, got {head_size}$"
    with pytest.raises(RuntimeError, match=message):
        case.run(ops.merge_compact)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 129, 1000])
def test_lengths(length, block_size):
    budget = -(-length // 2)
    check(make_case([(length, budget, length - budget)], block_size=block_size))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_batch(data):
    row = st.integers(0, 50).flatmap(
        lambda length: st.integers(0, length).flatmap(
            lambda budget: st.tuples(
                st.just(length), st.just(budget), st.integers(0, length - budget)
            )
        )
    )
    case = make_case(data.draw(st.lists(row, min_size=1, max_size=3)), head_size=64, block_size=8)
    # Any target column, also one whose slots are all sources.
    columns = [data.draw(st.integers(0, column)) for column in case.target_columns]
    check(replace(case, target_columns=columns))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_members_entries_are_moved_bit_for_bit(dtype, layout):
    case = make_case(ROWS, share_merged=0.0, dtype=dtype, layout=layout)
    actual, expected = case.run(ops.merge_compact), case.run(ops.merge_compact.reference)
    for after, want in zip(actual, expected, strict=True):
        assert_bitwise(after, want)


def test_full_budget_changes_nothing():
    case = make_case([(64, 64, 0), (32, 32, 0)])
    key, value, _ = case.run(ops.merge_compact)
    assert_bitwise(key, case.cache.key)
    assert_bitwise(value, case.cache.value)


def class_of_two(
    key: list[float],
    member_key: list[float],
    weights: list[float],
    key_merge: KeyMerge = KeyMerge.DIRECTION,
    mass_key: list[float] | None = None,
    sums_values: bool = False,
) -> tuple:
    """(key, value, score) after merging entry 1 into entry 0."""
    cache = paged_cache([2], num_kv_heads=1, block_size=2, head_size=64)
    block = cache.block_table[0, 0]
    # Two dimensions suffice; the others are 0.
    cache.key[0, block, 0] = pad(torch.tensor([key, member_key]), (0, 62))
    cache.value[0, block, 0] = pad(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), (0, 62))
    one_head = (None, None, None)
    scores = torch.zeros(1, 3, 1, 2)
    ops.merge_compact(
        cache.key,
        cache.value,
        scores,
        torch.tensor(weights)[one_head],
        torch.tensor([2.0, 3.0])[one_head],
        key_merge,
        sums_values,
        None if mass_key is None else pad(torch.tensor(mass_key), (0, 62))[one_head],
        cache.block_table,
        int_tensor([0])[one_head],
        int_tensor([1])[one_head],
        int_tensor([0])[one_head],
        int_tensor([1]),
        int_tensor([0]),
    )
    merged_key, merged_value = cache.key[0, block, 0, 0], cache.value[0, block, 0, 0]
    assert torch.all(merged_key[2:] == 0)
    assert torch.all(merged_value[2:] == 0)
    return merged_key[:2], merged_value[:2], scores[0, block, 0, 0]


def test_worked_example():
    key, value, score = class_of_two([5.0, 0.0], [0.0, 2.0], [3.0, 4.0])
    torch.testing.assert_close(key, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(value, torch.tensor([3 / 7, 4 / 7]))
    assert score == 5.0


def test_means_of_keys_and_sums_of_values():
    key, value, _ = class_of_two([5.0, 0.0], [0.0, 2.0], [3.0, 1.0], KeyMerge.MEAN)
    torch.testing.assert_close(key, torch.tensor([15 / 4, 2 / 4]))
    torch.testing.assert_close(value, torch.tensor([3 / 4, 1 / 4]))
    _, value, _ = class_of_two(
        [5.0, 0.0], [0.0, 2.0], [2.0, 1.0], KeyMerge.CENTRE, sums_values=True
    )
    torch.testing.assert_close(value, torch.tensor([1.0, 0.5]))


def test_zero_member_adds_no_direction():
    key, value, _ = class_of_two([5.0, 0.0], [0.0, 0.0], [3.0, 4.0])
    torch.testing.assert_close(key, torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(value, torch.tensor([3 / 7, 4 / 7]))


@pytest.mark.parametrize(
    ("key", "member_key", "weights"),
    [
        pytest.param([5.0, 0.0], [0.0, 2.0], [0.0, 0.0], id="no weight"),
        pytest.param([0.0, 0.0], [0.0, 2.0], [1.0, 1.0], id="zero centre"),
        pytest.param([5.0, 0.0], [-2.0, 0.0], [1.0, 1.0], id="opposite directions"),
    ],
)
def test_degenerate_class_is_its_centre(key, member_key, weights):
    merged_key, merged_value, score = class_of_two(key, member_key, weights)
    assert_bitwise(merged_key, torch.tensor(key))
    assert_bitwise(merged_value, torch.tensor([1.0, 0.0]))
    assert score == 5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives_conversion(dtype):
    """A member without weight leaves the value of its centre as it is, whatever that is."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values.where(values.isfinite(), 0).reshape(256, 256)
    cache = paged_cache([512], num_kv_heads=1, head_size=256, dtype=dtype)
    blocks, offsets = cache.block_table[0, :32].long().repeat_interleave(16), torch.arange(512) % 16
    cache.value[0, blocks[:256], 0, offsets[:256]] = values
    ranks = torch.arange(256, dtype=torch.int32)[None, None, None]
    weights = torch.cat([torch.ones(256), torch.zeros(256)])[None, None, None]
    ops.merge_compact(
        cache.key,
        cache.value,
        None,
        weights,
        None,
        KeyMerge.DIRECTION,
        False,
        None,
        cache.block_table,
        ranks,
        ranks + 256,
        ranks,
        int_tensor([256]),
        int_tensor([0]),
    )
    assert torch.equal(cache.value[0, blocks[:256], 0, offsets[:256]], values)


def test_merged_key_keeps_the_norm_of_its_centre():
    case = make_case([(128, 48, 60)])
    key, _, _ = case.run(ops.merge_compact)
    for layer, head in [(0, 0), (1, 1)]:
        before = gather_entries(case.cache.key[layer], case.cache.block_table[0], 128)[head]
        after = gather_entries(key[layer], case.cache.block_table[0], 128)[head]
        centres = case.selection.kept_idx[layer, 0, head].long()
        torch.testing.assert_close(after[-48:].norm(dim=-1), before[centres].norm(dim=-1))


def test_rows_may_share_source_blocks():
    case = make_case([(64, 16, 40), (64, 16, 40)])
    case.cache.block_table[1, :2] = case.cache.block_table[0, :2]
    check(case)


SHARING_ROWS = [
    (129, 48, 60),
    (113, 33, 7),
    (97, 40, 57),
    (100, 48, 0),
    (1, 1, 0),
    (130, 16, 100),
]


def assert_order_matters(case: Case) -> None:
    """Rows that are written one by one give something else."""
    together = case.run(ops.merge_compact.reference)
    one_by_one = replace(case, rows_together=1).run(ops.merge_compact.reference)
    written = case.written()[..., None].expand_as(together[0])
    assert (together[0] != one_by_one[0])[written].any()


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("rows_together", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_group_may_share_sources_and_targets(dtype, rows_together, num_kv_heads):
    case = make_case(SHARING_ROWS, dtype=dtype, num_kv_heads=num_kv_heads).sharing(rows_together)
    assert_order_matters(case)
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_scores", [True, False])
def test_groups_in_other_layouts(with_scores, layout):
    case = make_case(SHARING_ROWS, with_scores=with_scores, with_mass=True, layout=layout)
    check(case.sharing(3))


def test_two_rows_may_swap_their_blocks():
    """Written one by one, either of them would find the other's entries in place of its own."""
    case = make_case([(32, 16, 0), (32, 16, 0)], num_kv_heads=1).sharing(2)
    case.selection.kept_idx[:] = torch.arange(16)
    assert_order_matters(case)
    key, value, _ = case.run(ops.merge_compact)
    table = case.cache.block_table
    for before, after in ((case.cache.key, key), (case.cache.value, value)):
        assert_bitwise(after[:, table[:2, 1].long()], before[:, table[:2, 0].long()])


def test_a_group_is_not_split_between_batches(implementation):
    """A kv_head of a row fills a batch, so that a group, of one layer, exceeds it."""
    rows = [(33, 16, 17), (40, 16, 9)]
    case = make_case(rows, num_kv_heads=1, head_size=256, with_scores=False).sharing(2)
    # Keys and values of half of 32 MiB, beside which nothing else fits twice.
    max_budget = (16 << 20) // (2 * 256 * 4)
    kept = pad(case.selection.kept_idx, (0, max_budget - 16), value=-1)
    case = replace(case, selection=replace(case.selection, kept_idx=kept))
    assert_order_matters(case)
    check(case)
    if implementation == "cpu":
        return
    # The same rows, in batches of one.
    check(replace(case, rows_together=1))


def test_a_group_that_no_grid_takes(implementation):
    num_rows = 65_536
    args = make_case([(0, 0, 0)], num_kv_heads=1, head_size=64).args()
    for index in (3, 4, 9, 10, 11):
        args[index] = args[index].expand(-1, num_rows, -1, -1)
    args[8] = args[8].expand(num_rows, -1)
    args[12:] = [args[12].repeat(num_rows), args[13].repeat(num_rows), num_rows]
    if implementation == "cpu":
        ops.merge_compact(*args)
        return
    message = r"rows_together \* num_kv_heads must be at most 65535 on a GPU, got 65536"
    with pytest.raises(RuntimeError, match=message):
        ops.merge_compact(*args)


@pytest.mark.parametrize("rows_together", [-1, 0, 4, 12])
def test_rows_together_divides_the_rows(rows_together):
    case = replace(make_case(ROWS), rows_together=rows_together)
    message = r"rows_together must be at least 1 and divide the number of rows \(6\), got "
    with pytest.raises(RuntimeError, match=f"{message}{rows_together}$"):
        case.run(ops.merge_compact)


@pytest.mark.cpu_only
def test_opcheck():
    args = make_case([(30, 10, 8)], head_size=64, block_size=8).args()
    args = [arg.nan_to_num() if isinstance(arg, torch.Tensor) else arg for arg in args]
    ops.merge_compact(*args)
    torch.library.opcheck(torch.ops.ems_vllm.merge_compact.default, tuple(args))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.double(), "merge_compact: key_cache must have dtype float32, bfloat16"),
        (1, lambda t: t[:, 1:], r"value_cache must have shape \[2, 6, 2, 8, 64\]"),
        (2, lambda t: None, "accumulated_pages and carry must be given together or not at all"),
        (2, lambda t: t[..., 1:], r"accumulated_pages must have shape \[2, \*, 2, 8\]"),
        (3, lambda t: t[..., :20], r"carry must be as long as weights \(20\), got 33"),
        (5, lambda t: 3, "key_merge must be 0, 1 or 2, got 3"),
        (
            7,
            lambda t: torch.ones(2, 1, 2, 63),
            r"mass_keys must be as long as a key \(64\), got 63",
        ),
        (9, lambda t: t + 100, r"kept_idx\[0\] must be in 0\.\.32, got 1\d\d"),
        (11, lambda t: t[..., 1:], r"class_idx must be as long as merge_idx \(8\), got 7"),
        (13, lambda t: t + 2, r"target_columns\[0\] must be in 0\.\.3, got 4"),
        (13, lambda t: t + 1, rf"block_table\[0, 4\] must be in 0\.\.5, got {2**30}"),
    ],
)
@pytest.mark.cpu_only
def test_invalid_arguments(index, change, message):
    args = make_case([(30, 10, 8)], head_size=64, block_size=8).args()
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.merge_compact(*args)
