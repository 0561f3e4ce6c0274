# SPDX-License-Identifier: Apache-2.0
"""Which prompt queries of a step are accumulated into the global scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.engine.host_tensors import pad_rows, to_device

if TYPE_CHECKING:
    import torch

    from ems_vllm.engine.group_state import GroupStates
    from ems_vllm.engine.request_table import RunningRequest


@dataclass(frozen=True)
class ScoreRows:
    """Prompt chunks whose queries are accumulated; arguments of ops.score_queries by name."""

    block_table: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    seq_lens: torch.Tensor
    accumulate_lens: torch.Tensor
    score_table: torch.Tensor


def score_rows(
    rows: Sequence[tuple[RunningRequest, int]],
    states: GroupStates,
    group_id: int,
    block_size: int,
    device: torch.device,
) -> ScoreRows | None:
    """The prompt chunks of a batch that belong to requests whose prompt will be compressed.

    Args:
        rows: Requests of the batch and where their queries start in it.
        states: States of the requests in the group.
        group_id: Index of the group.
        block_size: Tokens per block.
        device: Of the result.

    Returns:
        None when there is no such chunk.
    """
    chosen = [
        (request, query_start)
        for request, query_start in rows
        if states[request].plan.compresses_prompt and request.num_computed < request.info.prompt_len
    ]
    if not chosen:
        return None
    # A resumed request computes generated tokens again too; only prompt queries count.
    seq_lens = [
        min(request.num_computed + request.num_scheduled, request.info.prompt_len)
        for request, _ in chosen
    ]
    columns = [
        request.block_ids[group_id][: -(-seq_len // block_size)]
        for (request, _), seq_len in zip(chosen, seq_lens, strict=True)
    ]
    pages = [states[request].pages(ids) for (request, _), ids in zip(chosen, columns, strict=True)]
    query_lens = [
        seq_len - request.num_computed
        for (request, _), seq_len in zip(chosen, seq_lens, strict=True)
    ]
    # The first chunk overwrites what an earlier owner of a page left behind.
    accumulate_lens = [
        0 if request.num_computed == request.num_cached else request.num_computed
        for request, _ in chosen
    ]
    return ScoreRows(
        block_table=pad_rows(columns, device),
        query_starts=to_device([start for _, start in chosen], device),
        query_lens=to_device(query_lens, device),
        seq_lens=to_device(seq_lens, device),
        accumulate_lens=to_device(accumulate_lens, device),
        score_table=pad_rows(pages, device),
    )
