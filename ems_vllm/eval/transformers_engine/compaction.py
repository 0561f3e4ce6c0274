# SPDX-License-Identifier: Apache-2.0
"""One compaction, as a policy is shown it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy

if TYPE_CHECKING:
    from ems_vllm.policies.rotation import Rotation
    from ems_vllm.spans import Span


@dataclass(frozen=True)
class CompactionSettings:
    """How the levels of a request are compacted.

    Attributes:
        policy: Which entries stay.
        obs_window: Last queries that score.
        sample_stride: Of the prompt's queries, one in so many is accumulated.
        scale: Softmax scale of the model.
        rotation: RoPE of the compressed layers; None for none.
        protected: Spans of positions that stay as they are, in order and apart.
        output_weights: Of the output projections, by index of a layer; see CompactionContext.
    """

    policy: Policy
    obs_window: int
    sample_stride: int
    scale: float
    rotation: Rotation | None = None
    protected: tuple[Span, ...] = ()
    output_weights: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """Entries of the rows of a compaction; see CompactionContext.

    Attributes:
        num_live, num_entries, num_scored, num_kept: Of each row.
        num_queries: Recorded ones.
        num_processed: Tokens of the request.
        num_represented: Of these, the ones whose queries are not accumulated yet.
        target_column: Where what is kept goes, in the table of every row.
        is_untouched: Nothing has been compacted before.
        rows_together: Consecutive rows that are kv_heads of a request.
    """

    num_live: Sequence[int]
    num_entries: Sequence[int]
    num_scored: Sequence[int]
    num_kept: Sequence[int]
    num_queries: int
    num_processed: int
    num_represented: int
    target_column: int
    is_untouched: bool
    rows_together: int = 1


def compaction_context(
    settings: CompactionSettings,
    counts: Counts,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    ring: torch.Tensor,
    accumulated_pages: torch.Tensor | None,
    layers: Sequence[int],
) -> CompactionContext:
    """What the policy sees of rows that are compacted together.

    Args:
        settings: Of the request.
        counts: Of the rows.
        keys, values: [num_layers, num_pages, num_kv_heads, block_size, head_size].
        table: [num_rows, num_columns], int32.
        ring: [num_layers, num_rows, obs_window, num_heads, head_size].
        accumulated_pages: [num_layers, num_pages, num_kv_heads, block_size], or None.
        layers: Their indices in the model.
    """
    num_rows, weights = len(table), settings.output_weights
    num_sinks = settings.policy.selector.num_sink_tokens

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=keys.device)

    return CompactionContext(
        key_cache=keys,
        value_cache=values,
        block_table=table,
        num_entries=ints(counts.num_entries),
        num_live=ints(counts.num_live),
        num_scored=ints(counts.num_scored),
        budgets=ints(counts.num_kept),
        num_protected=ints([min(num_sinks, kept) for kept in counts.num_kept]),
        target_columns=ints([counts.target_column] * num_rows),
        num_represented=ints([counts.num_represented] * num_rows),
        max_entries=max(counts.num_entries),
        max_budget=max(counts.num_kept),
        scale=settings.scale,
        accumulated_pages=accumulated_pages,
        score_table=table,
        query_ring=ring,
        ring_rows=ints(range(num_rows)),
        num_queries=ints([counts.num_queries] * num_rows),
        end_positions=ints([counts.num_processed] * num_rows),
        is_untouched=ints([counts.is_untouched] * num_rows).bool(),
        rotations=[settings.rotation] * keys.shape[0],
        rows_together=counts.rows_together,
        output_weights=[weights[layer] for layer in layers] if weights else (),
        layer_ids=list(layers),
    )


def keeping(
    context: CompactionContext, settings: CompactionSettings, num_kept: int, tail: int
) -> CompactionContext:
    """A context whose rows keep less than they may.

    Args:
        context: Of compaction_context.
        settings: Of the request.
        num_kept: Blocks to keep.
        tail: Column behind those that are compacted, in the tables of the rows.
    """
    budget = num_kept * context.block_size
    num_sinks = settings.policy.selector.num_sink_tokens
    return replace(
        context,
        budgets=torch.full_like(context.budgets, budget),
        num_protected=torch.full_like(context.num_protected, min(num_sinks, budget)),
        target_columns=torch.full_like(context.target_columns, tail - num_kept),
        max_budget=budget,
    )


def ring(queries: torch.Tensor, obs_window: int, end_position: int) -> torch.Tensor:
    """The last queries where ops.score_window looks for them.

    Args:
        queries: [num_layers, num_queries, num_heads, head_size], the newest last.
        obs_window: Size of the ring.
        end_position: One more than the position of the newest.

    Returns:
        [num_layers, 1, obs_window, num_heads, head_size].
    """
    num_layers, num_queries, *rest = queries.shape
    ring = queries.new_zeros((num_layers, 1, obs_window, *rest))
    positions = torch.arange(end_position - num_queries, end_position, device=queries.device)
    ring[:, 0, positions % obs_window] = queries
    return ring
