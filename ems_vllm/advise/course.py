# SPDX-License-Identifier: Apache-2.0
"""What one request holds and reads from its prompt to its end, by a server's plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.capacity import request_columns
from ems_vllm.config.request import RequestOptions
from ems_vllm.plan import PlanSettings

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan

_DENSE = RequestOptions(enabled=False)


@dataclass(frozen=True)
class Course:
    """Of a request of P prompt and O generated tokens, on the mean over compressed layers.

    Attributes:
        coming_in: Columns while its prompt is processed, and until they have come back.
        steps: (tokens generated, columns held from then on), ascending, from the end of the prompt
            to the last token.
        most: Columns from after the prompt on, at most.
        mean: The same in the mean over the generated tokens.
        kept: Entries per kv_head once the prompt has been compressed.
        read: Entries per kv_head that its decoding steps attend to, added up.
        compressed: Whether anything is compressed before it ends.
    """

    coming_in: float
    steps: tuple[tuple[int, float], ...]
    most: float
    mean: float
    kept: float
    read: float
    compressed: bool


def course(
    settings: PlanSettings | None, prompt_len: int, output_len: int, block_size: int
) -> Course:
    """The course of a request.

    Args:
        settings: Of the server; None: nothing is compressed.
        prompt_len: Tokens of the prompt, >= 1.
        output_len: Tokens generated, >= 0.
        block_size: Tokens per column.
    """
    if settings is None:
        dense = PlanSettings(1, None, 1, 0, 1)
        levels = [(1.0, dense.plan(prompt_len, block_size, _DENSE))]
        coming_in = float(_blocks(min(prompt_len + 2, prompt_len + output_len), block_size))
    else:
        found = list(settings.levels())
        num_layers = sum(count for count, _ in found)
        levels = [
            (count / num_layers, of_level.plan(prompt_len, block_size, RequestOptions()))
            for count, of_level in found
        ]
        # What comes in depends on the first two tokens after the prompt alone.
        coming_in = request_columns(settings, prompt_len, min(2, output_len), block_size).coming_in
    end = prompt_len + output_len
    steps = tuple(_steps(levels, prompt_len, end, block_size))
    # One step after the prompt, its columns have been given back.
    after = [columns for generated, columns in steps if generated >= min(1, output_len - 1)]
    last_step = end - 2
    return Course(
        coming_in=coming_in,
        steps=steps,
        most=max(after, default=coming_in),
        mean=_mean(steps, output_len),
        kept=sum(
            part * (prompt_len - block_size * plan.columns(prompt_len)[0]) for part, plan in levels
        ),
        read=sum(part * _read(plan, prompt_len, end) for part, plan in levels),
        compressed=any(
            plan.num_within_prompt or (last_step >= prompt_len and plan.columns(last_step)[0] > 0)
            for _, plan in levels
        ),
    )


def _steps(
    levels: list[tuple[float, CompressionPlan]], prompt_len: int, end: int, block_size: int
) -> Iterator[tuple[int, float]]:
    """Where the number of columns may change: at a block's edge, and a step after a compaction."""
    at = prompt_len
    while at < end:
        yield (
            at - prompt_len,
            sum(part * plan.max_live_columns(at) for part, plan in levels),
        )
        due = [plan.next_compaction(at - 1) for _, plan in levels]
        edge = (at // block_size + 1) * block_size
        at = min([edge, *(compaction + 1 for compaction in due if compaction is not None)])


def _mean(steps: tuple[tuple[int, float], ...], output_len: int) -> float:
    ends = [generated for generated, _ in steps[1:]] + [output_len]
    held = sum((end - start) * held for (start, held), end in zip(steps, ends, strict=False))
    return held / output_len if output_len else 0.0


def _read(plan: CompressionPlan, prompt_len: int, end: int) -> float:
    """A step with n processed tokens attends to these and its own, less what was given back."""
    total = 0
    start = prompt_len
    # The last token that is generated is not processed any more.
    while start < end - 1:
        due = plan.next_compaction(start)
        stop = end - 1 if due is None else min(due, end - 1)
        attended = (start + 1 + stop) * (stop - start) // 2
        total += attended - (stop - start) * plan.block_size * plan.columns(start)[0]
        start = stop
    return float(total)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
