# SPDX-License-Identifier: Apache-2.0
"""What is timed: every operator on one shape, with the work it must do at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ems_vllm import ops
from opbench import attention, baselines
from opbench.shapes import BLOCK_SIZE, OBS_WINDOW, Shape
from opbench.timing import graph_of

# Of prompts: how many of the last queries score (None for all), one in how many of these, and the
# share of an attention call that this may take.
SCORING = ((None, 1, 0.6), (None, 4, 0.2), (None, 16, 0.2), (256, 1, 0.02))
DECODE_ROWS = 64
NUM_PROTECTED = 4
THRESHOLD = 0.1
# What the recipe `ems` gives to recent attention.
LOCAL_SHARE, LOCAL_FIRST = 0.1, 26
# PyTorch builds rows of the attention matrix: seconds per call beyond this.
_LONGEST_BASELINE = 32 << 10


@dataclass
class Case:
    """One line of the report, or one per provider.

    Attributes:
        providers: What does the same work, by name; "ems_vllm" is ours.
        num_bytes: The least that must be read and written.
        flops: Of the products it cannot do without.
        target: (what its time is compared with, the share it may take): "attention" of one layer,
            "attention, all layers", "decode step" at its bandwidth floor, or "floor".
    """

    op: str
    variant: str
    providers: dict[str, Callable[[], object]] = field(repr=False)
    num_bytes: float
    flops: float
    target: tuple[str, float] | None = None


def filled(shape: Shape, value: int) -> torch.Tensor:
    """[num_rows], int32."""
    return torch.full((shape.num_rows,), value, dtype=torch.int32, device=shape.device)


def block_table(shape: Shape) -> torch.Tensor:
    """Blocks scattered over the whole cache."""
    blocks = torch.randperm(shape.num_rows * shape.num_columns, device=shape.device)
    return blocks.view(shape.num_rows, shape.num_columns).int()


def score_queries_args(
    shape: Shape,
    sample_stride: int = 1,
    with_lse: bool = True,
    num_queries: int | None = None,
) -> tuple:
    model, num_scoring = shape.model, _num_scoring(shape, num_queries)
    # No others, as in serving (engine/group/prompt_chunks.py).
    query = _random(shape, shape.num_rows * num_scoring, model.num_heads, model.head_size)
    num_blocks = shape.num_rows * shape.num_columns
    key = _random(shape, num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    table = block_table(shape)
    starts = torch.arange(shape.num_rows, device=shape.device, dtype=torch.int32) * num_scoring
    # About what random keys give.
    seen = torch.arange(1, shape.length + 1, device=shape.device)[-num_scoring:]
    lse = (seen.repeat(shape.num_rows).log() + 0.5)[:, None].repeat(1, model.num_heads)
    scores = torch.zeros(num_blocks, model.num_kv_heads, BLOCK_SIZE, device=shape.device)
    return (
        *(query, key, table, starts, filled(shape, num_scoring), filled(shape, shape.length)),
        *(filled(shape, 0), table, lse if with_lse else None, shape.scale, sample_stride, scores),
    )


def _num_scoring(shape: Shape, num_queries: int | None) -> int:
    """Queries of each prompt that score, before they are sampled."""
    return shape.length if num_queries is None else min(num_queries, shape.length)


def caches(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all layers; vectors are not centred, so that some resemble each other."""
    model, num_blocks = shape.model, shape.num_rows * shape.num_columns
    size = (model.num_layers, num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    return _random(shape, *size).add_(0.5), _random(shape, *size).add_(0.5)


def window_args(shape: Shape, key: torch.Tensor, table: torch.Tensor) -> tuple:
    model = shape.model
    ring = _random(
        shape, model.num_layers, shape.num_rows, OBS_WINDOW, model.num_heads, model.head_size
    )
    rows = torch.arange(shape.num_rows, device=shape.device, dtype=torch.int32)
    length = filled(shape, shape.length)
    window = filled(shape, min(OBS_WINDOW, shape.length))
    heads = (model.num_layers, shape.num_rows, model.num_kv_heads)
    scores = torch.rand(*heads, shape.length, device=shape.device)
    peaks = torch.empty_like(scores)
    return ring, rows, window, length, key, table, length, length, shape.scale, scores, None, peaks


def norms_args(shape: Shape, cache: torch.Tensor, table: torch.Tensor) -> tuple:
    return cache, table, filled(shape, shape.length), _per_entry(shape)


def key_args(shape: Shape, key: torch.Tensor, table: torch.Tensor) -> tuple[tuple, tuple]:
    """Of key_moments, and of key_scores with what those are."""
    model = shape.model
    frequencies = 10_000.0 ** -torch.linspace(0, 1, model.head_size // 2, device=shape.device)
    turns = torch.outer(torch.arange(float(shape.length), device=shape.device), frequencies)
    cos_sin = torch.cat([turns.cos(), turns.sin()], dim=1).to(shape.dtype)
    keys = key, table, filled(shape, shape.length), cos_sin, True
    heads = (model.num_layers, shape.num_rows, model.num_kv_heads, model.head_size)
    directions, means = (torch.empty(heads, device=shape.device) for _ in range(2))
    products = torch.empty(*heads, model.head_size, device=shape.device)
    moments = *keys, directions, means, products
    ops.key_moments(*moments)
    factors = torch.linalg.cholesky(
        products + 0.1 * shape.length * torch.eye(model.head_size).to(products)
    )
    whitening = torch.linalg.inv(factors).contiguous()
    scores = directions, _per_entry(shape), means, whitening, _per_entry(shape)
    return moments, (*keys, *scores)


def _per_entry(shape: Shape) -> torch.Tensor:
    heads = (shape.model.num_layers, shape.num_rows, shape.model.num_kv_heads)
    return torch.empty(*heads, shape.length, device=shape.device)


@dataclass
class Compaction:
    """Arguments of the three operators of a compaction, each made by the one before."""

    select: tuple
    assign: tuple
    merge: tuple

    def run(self, namespace: object) -> None:
        """One compaction of all layers."""
        namespace.select_entries(*self.select)  # type: ignore[attr-defined]
        namespace.assign_classes(*self.assign)  # type: ignore[attr-defined]
        namespace.merge_compact(*self.merge)  # type: ignore[attr-defined]


def compaction_args(
    shape: Shape, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
) -> Compaction:
    heads = (shape.model.num_layers, shape.num_rows, shape.model.num_kv_heads)
    scores = torch.rand(*heads, shape.length, device=shape.device)
    kept_idx, merge_idx, class_idx = (
        torch.zeros(*heads, shape.budget, dtype=torch.int32, device=shape.device) for _ in range(3)
    )
    budgets, protected = filled(shape, shape.budget), filled(shape, NUM_PROTECTED)
    length = filled(shape, shape.length)
    mass_keys = torch.randn(*heads, key.shape[-1], device=shape.device)
    target = filled(shape, shape.length // BLOCK_SIZE - -(-shape.budget // BLOCK_SIZE))
    selection = (table, kept_idx, merge_idx)
    args = Compaction(
        select=(scores, length, budgets, protected, budgets, 1.0, kept_idx, merge_idx),
        assign=(key, value, *selection, budgets, protected, THRESHOLD, class_idx),
        merge=(
            *(key, value, None, scores, None, ops.KeyMerge.CENTRE, False, mass_keys),
            *(*selection, class_idx, budgets, target),
        ),
    )
    ops.select_entries(*args.select)
    ops.assign_classes(*args.assign)
    return args


def rank_args(shape: Shape) -> tuple:
    """Of the second of several orders: weights are not 0."""
    heads = (shape.model.num_layers, shape.num_rows, shape.model.num_kv_heads)
    scores, weights = (torch.rand(*heads, shape.length, device=shape.device) for _ in range(2))
    counts = filled(shape, shape.length), filled(shape, NUM_PROTECTED)
    return scores, *counts, None, LOCAL_SHARE, LOCAL_FIRST, weights


def record_args(shape: Shape, num_tokens: int) -> tuple:
    model = shape.model
    query = _random(shape, num_tokens, model.num_heads, model.head_size)
    ring = _random(shape, num_tokens, OBS_WINDOW, model.num_heads, model.head_size)
    slots = torch.arange(num_tokens, device=shape.device) * OBS_WINDOW
    return query, slots, ring


def shift_args(shape: Shape, num_rows: int) -> tuple:
    table = torch.randint(
        0, 1000, (num_rows, shape.num_columns), dtype=torch.int32, device=shape.device
    )
    lens = torch.full((num_rows,), shape.length, dtype=torch.int32, device=shape.device)
    first = lens // BLOCK_SIZE - shape.budget // BLOCK_SIZE
    return table, lens, first, BLOCK_SIZE, torch.empty_like(table), torch.empty_like(lens)


def head_pages_args(shape: Shape, num_rows: int) -> tuple:
    """A block of new tokens behind what is compressed; kv_heads own 0.5 to 1.5 times the budget."""
    num_kv_heads, num_dealt = shape.model.num_kv_heads, shape.budget // BLOCK_SIZE
    num_columns = num_dealt + 1
    table = torch.randperm(num_rows * num_columns, device=shape.device).view(num_rows, -1).int()
    lens = torch.full((num_rows,), num_columns * BLOCK_SIZE, dtype=torch.int32, device=shape.device)
    places = torch.arange(num_rows, dtype=torch.int32, device=shape.device)
    bounds = torch.linspace(0.5, 1.5, num_kv_heads, device=shape.device).cumsum(0) * num_dealt
    starts = torch.zeros(num_rows, num_kv_heads + 1, dtype=torch.int32, device=shape.device)
    starts[:, 1:] = bounds.round().int()
    starts[:, -1] = num_dealt * num_kv_heads
    widest = int(starts[0].diff().max()) + 1
    out_table = torch.zeros(
        (num_rows * num_kv_heads, widest), dtype=torch.int32, device=shape.device
    )
    return table, lens, places, starts, BLOCK_SIZE, out_table, out_table[:, 0].clone()


def of_shape(shape: Shape) -> Iterator[Case]:
    """Every operator, one at a time, so that memory is free again before the next."""
    yield from _prompt(shape)
    yield from _compaction(shape)
    yield from _decode(shape)


def _prompt(shape: Shape) -> Iterator[Case]:
    floor = attention.flops(shape) / 2
    for with_lse in (True, False):
        for num_queries, stride, share in SCORING:
            args = score_queries_args(shape, stride, with_lse, num_queries)
            queries = "all queries" if num_queries is None else f"last {num_queries}"
            variant = f"{'lse given' if with_lse else 'lse computed'}, {queries}, 1 in {stride}"
            providers = {"ems_vllm": lambda args=args: ops.score_queries(*args)}
            is_whole = num_queries is None and stride == 1
            if is_whole and not with_lse and shape.length <= _LONGEST_BASELINE:
                providers["pytorch"] = lambda args=args: baselines.score_queries(*args)
            num_scoring = _num_scoring(shape, num_queries)
            num_vectors = shape.length + shape.group * num_scoring / stride
            num_bytes = shape.num_rows * _entry_bytes(shape) * num_vectors
            # Of the pairs of a query and a key that it sees.
            part = num_scoring * (2 * shape.length - num_scoring) / shape.length**2
            flops = floor * part / stride * (1 if with_lse else 2)
            yield Case("score_queries", variant, providers, num_bytes, flops, ("attention", share))


def _window(shape: Shape, key: torch.Tensor, table: torch.Tensor) -> Case:
    heads, head_size = shape.num_heads_in_all, shape.model.head_size
    args = window_args(shape, key, table)
    keys = heads * shape.length
    return Case(
        "score_window",
        f"window {OBS_WINDOW}, all layers",
        {
            "ems_vllm": lambda: ops.score_window(*args),
            "pytorch": lambda: baselines.score_window(*args),
        },
        keys * (head_size * shape.element_bytes + 2 * 4),
        2.0 * keys * shape.group * OBS_WINDOW * head_size,
        ("attention, all layers", 0.01),
    )


def _keys(
    shape: Shape, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
) -> Iterator[Case]:
    num_keys, head_size = shape.num_heads_in_all * shape.length, shape.model.head_size
    vector_bytes = head_size * shape.element_bytes
    moments, scores = key_args(shape, key, table)
    # Of products, half: the other is a mirror image, or zero.
    flops = float(num_keys * head_size**2)
    each = {
        "vector_norms": (
            norms_args(shape, value, table),
            vector_bytes + 4,
            0.0,
            ("floor", 1 / 0.7),
        ),
        "key_moments": (moments, vector_bytes, flops, ("attention, all layers", 0.01)),
        "key_scores": (scores, vector_bytes + 2 * 4, flops, ("attention, all layers", 0.01)),
    }
    for op, (op_args, key_bytes, op_flops, target) in each.items():
        providers = {
            name: lambda op=op, op_args=op_args, namespace=namespace: getattr(namespace, op)(
                *op_args
            )
            for name, namespace in (("ems_vllm", ops), ("pytorch", baselines))
        }
        yield Case(op, "all layers", providers, num_keys * key_bytes, op_flops, target)


def _compaction(shape: Shape) -> Iterator[Case]:
    model, heads = shape.model, shape.num_heads_in_all
    key, value = caches(shape)
    table = block_table(shape)
    yield _window(shape, key, table)
    yield from _keys(shape, key, value, table)
    compaction = compaction_args(shape, key, value, table)
    yield _ranks(shape)
    entry_bytes = 2 * model.head_size * shape.element_bytes
    moved = heads * shape.budget * entry_bytes
    select_bytes = heads * 4.0 * (shape.length + 2 * shape.budget)
    assign_flops = 4.0 * heads * shape.budget**2 * model.head_size
    each = {
        "select_entries": (compaction.select, select_bytes, 0.0, None),
        "assign_classes": (compaction.assign, 2.0 * moved, assign_flops, None),
        # Centres and members are read, classes are written.
        "merge_compact": (compaction.merge, 3.0 * moved, 0.0, ("floor", 1 / 0.7)),
    }
    for op, (op_args, num_bytes, flops, target) in each.items():
        providers = {
            name: lambda op=op, op_args=op_args, namespace=namespace: getattr(namespace, op)(
                *op_args
            )
            for name, namespace in (("ems_vllm", ops), ("pytorch", baselines))
        }
        yield Case(op, "all layers", providers, num_bytes, flops, target)
    yield Case(
        "select + assign + merge",
        "all layers",
        {
            "ems_vllm": lambda: compaction.run(ops),
            "pytorch": lambda: compaction.run(baselines),
        },
        select_bytes + 3.0 * moved,
        assign_flops,
        ("attention, all layers", 0.03),
    )


def _ranks(shape: Shape) -> Case:
    args = rank_args(shape)
    return Case(
        "rank_entries",
        "one order, all layers",
        {
            "ems_vllm": lambda: ops.rank_entries(*args),
            "pytorch": lambda: baselines.rank_entries(*args),
        },
        # Scores are read, weights are read and written.
        3.0 * 4 * args[0].numel(),
        0.0,
        ("attention, all layers", 0.002),
    )


def _decode(shape: Shape) -> Iterator[Case]:
    layers = [record_args(shape, DECODE_ROWS) for _ in range(shape.model.num_layers)]
    shift = shift_args(shape, DECODE_ROWS)

    def step(namespace: object) -> None:
        namespace.shift_block_tables(*shift)  # type: ignore[attr-defined]
        for args in layers:
            namespace.record_queries(*args)  # type: ignore[attr-defined]

    providers: dict[str, Callable[[], object]] = {
        "ems_vllm": lambda: step(ops),
        "pytorch": lambda: step(baselines),
    }
    if shape.device.type == "cuda":
        providers = {name: graph_of(run) for name, run in providers.items()}
    query = layers[0][0]
    num_bytes = 2.0 * len(layers) * query.numel() * query.element_size() + 8.0 * shift[0].numel()
    yield Case(
        "record_queries + shift_block_tables",
        f"{DECODE_ROWS} rows, all layers" + (", graph" if shape.device.type == "cuda" else ""),
        providers,
        num_bytes,
        0.0,
        ("decode step", 0.01) if shape.model.weight_bytes else None,
    )
    yield _head_pages(shape)


def _head_pages(shape: Shape) -> Case:
    layers = [head_pages_args(shape, DECODE_ROWS) for _ in range(shape.model.num_layers)]

    def step(namespace: object) -> None:
        for args in layers:
            namespace.head_pages(*args)  # type: ignore[attr-defined]

    providers: dict[str, Callable[[], object]] = {
        "ems_vllm": lambda: step(ops),
        "pytorch": lambda: step(baselines),
    }
    if shape.device.type == "cuda":
        providers = {name: graph_of(run) for name, run in providers.items()}
    # As many pages are written as there are in the tables.
    table = layers[0][0]
    num_bytes = 4.0 * len(layers) * table.numel() * (1 + shape.model.num_kv_heads)
    return Case(
        "head_pages",
        f"{DECODE_ROWS} rows, all layers" + (", graph" if shape.device.type == "cuda" else ""),
        providers,
        num_bytes,
        0.0,
        ("decode step", 0.02) if shape.model.weight_bytes else None,
    )


def decode_step_bytes(shape: Shape) -> float:
    """What a decode step of DECODE_ROWS compressed requests reads at least: weights and cache."""
    live = shape.budget + OBS_WINDOW
    return shape.model.weight_bytes + (
        DECODE_ROWS * live * 2 * shape.model.num_layers * _entry_bytes(shape)
    )


def budget_of(length: int) -> int:
    """1024, and less for short prompts: whole blocks, at most a quarter."""
    return min(1024, max(length // 4 // BLOCK_SIZE, 1) * BLOCK_SIZE)


def _entry_bytes(shape: Shape) -> int:
    """Keys of one token in one layer."""
    return shape.model.num_kv_heads * shape.model.head_size * shape.element_bytes


def _random(shape: Shape, *size: int) -> torch.Tensor:
    # Straight into the dtype: in float32 the largest would not fit beside the others.
    assert math.prod(size) > 0
    return torch.empty(size, device=shape.device, dtype=shape.dtype).normal_()
