# SPDX-License-Identifier: Apache-2.0
"""Before an operator is timed: its result on a small shape is the reference's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ems_vllm import ops
from opbench import cases
from opbench.shapes import Shape


def arguments(shape: Shape) -> Iterator[tuple[str, tuple]]:
    """Every operator with arguments of a shape."""
    for stride, with_lse in ((1, False), (2, True)):
        yield "score_queries", cases.score_queries_args(shape, stride, with_lse)
    key, value = cases.caches(shape)
    table = cases.block_table(shape)
    yield "score_window", cases.window_args(shape, key, table)
    yield "vector_norms", cases.norms_args(shape, value, table)
    moments, scores = cases.key_args(shape, key, table)
    yield "key_moments", moments
    yield "key_scores", scores
    compaction = cases.compaction_args(shape, key, value, table)
    yield "rank_entries", cases.rank_args(shape)
    yield "select_entries", compaction.select
    yield "assign_classes", compaction.assign
    yield "merge_compact", compaction.merge
    yield "record_queries", cases.record_args(shape, 5)
    yield "shift_block_tables", cases.shift_args(shape, 5)
    yield "head_pages", cases.head_pages_args(shape, 5)


def check(shape: Shape) -> None:
    """Raises AssertionError where an operator and its reference differ beyond rounding."""
    for op, args in arguments(shape):
        actual = tuple(_copy(arg, shape.device) for arg in args)
        expected = tuple(_copy(arg, torch.device("cpu")) for arg in args)
        getattr(ops, op)(*actual)
        getattr(ops, op).reference(*expected)
        compare(op, actual, expected)


def compare(op: str, actual: tuple, expected: tuple) -> None:
    """Every tensor of two lists of arguments, as far as rounding lets them be compared."""
    for got, want in zip(actual, expected, strict=True):
        if not isinstance(got, torch.Tensor):
            continue
        got, want = got.cpu(), want.cpu()
        if op == "assign_classes" and got.dtype == torch.int32:
            # Rounding decides between classes that are almost equally good.
            assert (got != want).float().mean() < 0.02, f"{op}: classes differ"
        else:
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3, msg=lambda m: f"{op}: {m}")


def _copy(arg: object, device: torch.device) -> object:
    return arg.to(device, copy=True) if isinstance(arg, torch.Tensor) else arg
