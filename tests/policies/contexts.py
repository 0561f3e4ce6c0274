# SPDX-License-Identifier: Apache-2.0
"""Random caches in which some rows are due for compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.rotation import Rotation

BLOCK_SIZE = 8
NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_SIZE, WINDOW = 2, 2, 2, 16, 4
NUM_SINKS = 2
_ANGLES = torch.outer(torch.arange(512.0), 100.0 ** -torch.linspace(0, 1, HEAD_SIZE // 4))
# Of half of the dimensions.
HIDDEN_SIZE = 24
OUTPUT_WEIGHTS = torch.randn(
    (NUM_LAYERS, HIDDEN_SIZE, NUM_KV_HEADS * GROUP * HEAD_SIZE),
    generator=torch.Generator().manual_seed(7),
)
ROTATION = Rotation(torch.cat([_ANGLES.cos(), _ANGLES.sin()], dim=1), is_neox=True)


@dataclass(frozen=True)
class Row:
    """One request: entries to choose from, tail tokens, and entries to keep."""

    num_entries: int
    tail: int
    budget: int
    num_scored: int | None = None
    num_represented: int = 0
    seed: int = 0


def build_context(rows: Sequence[Row]) -> CompactionContext:
    """A context whose rows depend on their own seed only, not on the other rows."""
    columns = [-(-(row.num_entries + row.tail) // BLOCK_SIZE) for row in rows]
    num_blocks = sum(columns) + 3
    cache = torch.full(
        (NUM_LAYERS, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE), float("nan")
    )
    accumulated_pages = torch.full((NUM_LAYERS, num_blocks, NUM_KV_HEADS, BLOCK_SIZE), float("nan"))
    ring = torch.full(
        (NUM_LAYERS, len(rows), WINDOW, NUM_KV_HEADS * GROUP, HEAD_SIZE), float("nan")
    )
    block_table = torch.zeros((len(rows), max(columns)), dtype=torch.int32)
    # Scattered over the pool, block 0 and the last ones unused.
    ids = torch.randperm(sum(columns), generator=torch.Generator().manual_seed(1)) + 1
    at = 0
    for index, (row, count) in enumerate(zip(rows, columns, strict=True)):
        own = ids[at : at + count]
        at += count
        block_table[index, :count] = own
        generator = torch.Generator().manual_seed(row.seed)

        def randn(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        ring[:, index] = randn(*ring[:, index].shape)
        for column, block_id in enumerate(own.tolist()):
            live = min(BLOCK_SIZE, row.num_entries + row.tail - column * BLOCK_SIZE)
            cache[:, block_id, :, :live] = randn(NUM_LAYERS, NUM_KV_HEADS, live, 2 * HEAD_SIZE)
            accumulated_pages[:, block_id, :, :live] = randn(NUM_LAYERS, NUM_KV_HEADS, live).abs()
    ints = lambda values: torch.tensor(list(values), dtype=torch.int32)  # noqa: E731
    key_cache, value_cache = cache.chunk(2, dim=-1)
    return CompactionContext(
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        num_entries=ints(row.num_entries for row in rows),
        num_live=ints(row.num_entries + row.tail for row in rows),
        num_scored=ints(
            row.num_entries if row.num_scored is None else row.num_scored for row in rows
        ),
        budgets=ints(row.budget for row in rows),
        num_protected=ints(min(NUM_SINKS, row.budget) for row in rows),
        target_columns=ints((row.num_entries - row.budget) // BLOCK_SIZE for row in rows),
        num_represented=ints(row.num_represented for row in rows),
        max_entries=max(row.num_entries for row in rows),
        max_budget=max(row.budget for row in rows),
        scale=HEAD_SIZE**-0.5,
        accumulated_pages=accumulated_pages,
        score_table=block_table.clone(),
        query_ring=ring,
        ring_rows=ints(range(len(rows))),
        num_queries=ints(min(WINDOW, row.tail) for row in rows),
        end_positions=ints(300 + row.num_entries + row.tail for row in rows),
        is_untouched=torch.tensor([row.num_represented == 0 for row in rows]),
        rotations=[ROTATION] * NUM_LAYERS,
        output_weights=OUTPUT_WEIGHTS,
        layer_ids=range(NUM_LAYERS),
    )


def entries(cache: torch.Tensor, context: CompactionContext, row: int) -> torch.Tensor:
    """[num_layers, num_kv_heads, num_live, ...]: a row's live entries of a paged tensor."""
    num_live = int(context.num_live[row])
    columns = -(-num_live // BLOCK_SIZE)
    pages = cache[:, context.block_table[row, :columns].long()]
    return pages.transpose(1, 2).flatten(2, 3)[:, :, :num_live]


def heads_as_rows(context: CompactionContext) -> CompactionContext:
    """The same memory, where every kv_head is a row with pages of its own."""
    num_heads = context.num_kv_heads

    def pages(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1, 2).unsqueeze(2)

    def table(blocks: torch.Tensor) -> torch.Tensor:
        return (blocks[:, None] * num_heads + torch.arange(num_heads)[:, None]).flatten(0, 1).int()

    assert context.accumulated_pages is not None
    assert context.score_table is not None
    assert context.query_ring is not None
    ring = context.query_ring.unflatten(3, (num_heads, -1)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    by_row = (
        *("num_entries", "num_live", "num_scored", "budgets", "num_protected", "target_columns"),
        *("num_represented", "num_queries", "end_positions", "is_untouched"),
    )
    repeated = {name: getattr(context, name).repeat_interleave(num_heads) for name in by_row}
    return replace(
        context,
        key_cache=pages(context.key_cache),
        value_cache=pages(context.value_cache),
        accumulated_pages=pages(context.accumulated_pages),
        block_table=table(context.block_table),
        score_table=table(context.score_table),
        query_ring=ring,
        ring_rows=torch.arange(num_heads * context.num_rows, dtype=torch.int32),
        rows_together=num_heads,
        **repeated,
    )
