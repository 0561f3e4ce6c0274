# SPDX-License-Identifier: Apache-2.0
"""Columns that requests hold, and how many requests a pool holds: arithmetic, no measurement."""

from __future__ import annotations

from dataclasses import dataclass

from ems_vllm.config.request import RequestOptions
from ems_vllm.plan import PlanSettings

# Block 0 of vLLM's pool is never given to a request.
_NULL_BLOCKS = 1


@dataclass(frozen=True)
class RequestColumns:
    """Block-table columns of one request, on the mean over the layers.

    Attributes:
        dense: At its end, without compression.
        coming_in: While its prompt is processed, and until its columns have come back.
        after_prompt: Once its prompt has been compressed.
        at_end: At its end.
        decoding: At most, from after_prompt on; reached between two compressions.
        comes_compressed: Whether its prompt is compressed while it is processed.
    """

    dense: int
    coming_in: float
    after_prompt: float
    at_end: float
    decoding: float
    comes_compressed: bool

    @property
    def at_most(self) -> float:
        """At any time; of a prompt that is processed dense, from after_prompt on."""
        return max(self.decoding, self.coming_in) if self.comes_compressed else self.decoding


def request_columns(
    settings: PlanSettings, prompt_len: int, output_len: int, block_size: int
) -> RequestColumns:
    """What a request of a prompt and so many generated tokens holds.

    Args:
        settings: Of the server, with the shares of its layers where there are such.
        prompt_len: Tokens of the prompt, >= 1.
        output_len: Tokens generated, >= 0.
        block_size: Tokens per column.
    """
    end = prompt_len + output_len
    dense = _blocks(end, block_size)
    # One step after the prompt, its columns have been given back.
    first = min(prompt_len + 2, end)
    steps = range(first, end + 1)
    coming_in = after_prompt = at_end = decoding = 0.0
    comes_compressed = False
    num_layers = sum(count for count, _ in settings.levels())
    for count, of_level in settings.levels():
        plan, part = of_level.plan(prompt_len, block_size, RequestOptions()), count / num_layers
        after_prompt += part * (_blocks(prompt_len + 1, block_size) - plan.columns(prompt_len)[0])
        at_end += part * (dense - plan.columns(end)[0])
        decoding += part * min(dense, max(plan.max_live_columns(n) for n in steps))
        whole = _blocks(first, block_size)
        if plan.num_within_prompt:
            comes_compressed = True
            whole = min(whole, plan.max_replay_columns(prompt_len))
        coming_in += part * whole
    return RequestColumns(dense, coming_in, after_prompt, at_end, decoding, comes_compressed)


@dataclass(frozen=True)
class PoolFit:
    """Requests of one kind that a pool holds at a time.

    Attributes:
        dense: Without compression, each with room for its last token.
        decoding: Compressed, all of them past their prompts.
        with_one_coming_in: Compressed, of which one's prompt is still being processed; 0 where
            that prompt alone does not fit.
    """

    dense: int
    decoding: int
    with_one_coming_in: int


def pool_fit(columns: RequestColumns, pool_columns: int) -> PoolFit:
    """How many requests fit.

    Args:
        columns: Of each request.
        pool_columns: Columns of the pool, as pool_columns().
    """
    beside = pool_columns - columns.coming_in
    return PoolFit(
        dense=int(pool_columns // columns.dense),
        decoding=int(pool_columns // columns.decoding),
        with_one_coming_in=0 if beside < 0 else 1 + int(beside // columns.decoding),
    )


def pool_columns(pool_bytes: int, column_bytes: int) -> int:
    """Columns that requests may hold of a pool of so many bytes."""
    return max(0, pool_bytes // column_bytes - _NULL_BLOCKS)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
