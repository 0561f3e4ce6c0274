# SPDX-License-Identifier: Apache-2.0
"""From rows on the host and a group's tensors to what a policy sees."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ems_vllm.engine.group.layer_stack import as_pages
from ems_vllm.engine.group.to_device import to_device
from ems_vllm.policies.context import CompactionContext

if TYPE_CHECKING:
    import numpy as np

    from ems_vllm.engine.group.compaction_rows import CompactionRows
    from ems_vllm.engine.group.layer_stack import LayerStack
    from ems_vllm.engine.group.ranks import Ranks
    from ems_vllm.engine.group.tensors import GroupTensors


def context_of(
    tensors: GroupTensors, rows: CompactionRows, stack: LayerStack, ranks: Ranks
) -> CompactionContext:
    """Requests as rows, in some layers of a group."""
    scores = None if tensors.scores is None else tensors.scores[stack.layers]
    ring = None if tensors.query_ring is None else tensors.query_ring.queries[stack.layers]
    context = _context(tensors, rows, stack, stack.key_cache, stack.value_cache, scores, ring)
    return replace(context, sum_of_ranks=ranks.sum)


def context_of_heads(
    tensors: GroupTensors, requests: CompactionRows, rows: CompactionRows, stack: LayerStack
) -> CompactionContext:
    """kv_heads of requests as rows, in one layer of a group.

    Args:
        requests: The requests as rows.
        rows: Made of them by compaction_rows.by_head, dealt to or not yet.
        stack: Of one layer.
    """
    num_heads = tensors.spec.num_kv_heads
    scores = ring = None
    if tensors.scores is not None:
        scores = as_pages(tensors.scores[stack.layers], 1)
    if tensors.query_ring is not None:
        of_layer = tensors.query_ring.queries[stack.layers.start]
        at = to_device(requests.ring_rows, tensors.device, torch.int64)
        # Query heads of a kv_head lie next to each other.
        of_heads = of_layer[at].unflatten(2, (num_heads, -1)).transpose(1, 2)
        ring = of_heads.flatten(0, 1)[None]
    key_pages, value_pages = (as_pages(cache, 1) for cache in (stack.key_cache, stack.value_cache))
    return _context(tensors, rows, stack, key_pages, value_pages, scores, ring)


def with_targets(context: CompactionContext, rows: CompactionRows) -> CompactionContext:
    """A context of rows of which it was open how many entries they keep, once it is said.

    Args:
        context: Of the same rows.
        rows: As they are now.
    """
    return replace(
        context,
        block_table=to_device(rows.block_table, context.device),
        budgets=to_device(rows.budgets, context.device),
        num_protected=to_device(rows.num_protected, context.device),
        target_columns=to_device(rows.target_columns, context.device),
        max_budget=int(rows.budgets.max()),
    )


def _context(
    tensors: GroupTensors,
    rows: CompactionRows,
    stack: LayerStack,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scores: torch.Tensor | None,
    ring: torch.Tensor | None,
) -> CompactionContext:
    device = tensors.device

    def moved(values: np.ndarray) -> torch.Tensor:
        dtype = torch.bool if values.dtype == bool else torch.int32
        return to_device(values, device, dtype)

    key_scales = None if tensors.key_scales is None else tensors.key_scales[stack.layers]
    return CompactionContext(
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=moved(rows.block_table),
        num_entries=moved(rows.num_entries),
        num_live=moved(rows.num_live),
        num_scored=moved(rows.num_scored),
        budgets=moved(rows.budgets),
        num_protected=moved(rows.num_protected),
        target_columns=moved(rows.target_columns),
        num_represented=moved(rows.num_represented),
        max_entries=int(rows.num_entries.max()),
        max_budget=int(rows.budgets.max()),
        scale=tensors.scale,
        accumulated_pages=scores,
        score_table=None if scores is None else moved(rows.score_table),
        query_ring=ring,
        ring_rows=moved(rows.ring_rows),
        num_queries=moved(rows.num_queries),
        end_positions=moved(rows.end_positions),
        is_untouched=moved(rows.is_untouched),
        key_scales=key_scales,
        rotations=tensors.rotations[stack.layers],
        output_weights=tensors.output_weights[stack.layers],
        layer_ids=tensors.layer_ids[stack.layers],
        first_head=tensors.first_head,
        first_kv_head=tensors.first_kv_head,
        rows_together=rows.rows_together,
    )
